"""Several frontend processes on one port: start, restart, replace and stop.

| task | started by | ends |
|---|---|---|
| one task for each place, which restarts its process (`_keep`) | `run` | cancelled when `run` ends |
| the watch, which kills a process that hangs (`frontend_watch`) | `run` | cancelled when `run` ends |
| replacement of all processes (`_replace_all`) | SIGHUP | when all are replaced; cancelled when `run` ends |

A place has a listening socket, of which this process keeps a copy. So a process can be replaced without
loss: connections that it has not accepted wait in the socket for its successor. The socket of a process that
died is closed, and new connections go to the other places at once.

A process's standard input is a pipe that nothing is written to. It ends with this process, and the frontend
process then drains and ends (`end_with_parent`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from dynamo_redis.cli.failures import CommandFailed
from dynamo_redis.cli.frontend_watch import watch
from dynamo_redis.cli.output import print_line
from dynamo_redis.cli.service import READY
from dynamo_redis.frontend.http.port import SharedPort
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

DRAINS: Final = "drains"
"""The line that a frontend process prints when it begins to drain."""

GRACE_BEYOND_DRAIN_S: Final = 5.0
START_TIMEOUT_S: Final = 60.0
"""Longest time in which a successor has to be ready; its predecessor serves meanwhile."""
_PAUSES_S: Final = (0.5, 10.0)


class FrontendProcess:
    """One frontend process. `ended` is its exit code."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child
        self.ready = asyncio.Event()
        self.leaving = asyncio.Event()
        """Set once it drains or has ended."""
        self.drains = False
        self.silent_since: float | None = None
        """When it was first found silent, on `time.monotonic`; None: it answers."""
        self.ended = asyncio.create_task(self._follow(), name=f"frontend process {child.pid}")

    @classmethod
    async def start(cls, listener: socket.socket, siblings: Path, env: Mapping[str, str]) -> Self:
        """Start a process that accepts from this socket, and from one of its own in the directory `siblings`.

        Raises OSError.
        """
        descriptor = listener.fileno()
        options = ("--listener-fd", str(descriptor), "--siblings", str(siblings))
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "dynamo_redis", "frontend", *options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[descriptor],
            env=env,
            start_new_session=True,  # Ctrl-C reaches only the parent
        )
        return cls(child)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    async def until_ready(self) -> bool:
        """Wait until it serves; return False if it ends before."""
        ready = asyncio.create_task(self.ready.wait())
        try:
            await asyncio.wait({ready, self.ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        return self.ready.is_set()

    def terminate(self) -> None:
        """Send SIGTERM, unless it drains already: a second signal would end it at once."""
        if not self.drains:
            self.drains = True
            with suppress(ProcessLookupError):
                self._child.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        with suppress(ProcessLookupError):
            self._child.kill()

    async def wait(self, timeout_s: float) -> int:
        """Return the exit code. The process is killed when the time is over."""
        done, _ = await asyncio.wait({self.ended}, timeout=timeout_s)
        if not done:
            log.warning("frontend process %d has not ended within %g s: killing it", self.pid, timeout_s)
            self.kill()
        return await self.ended

    async def _follow(self) -> int:
        assert self._child.stdout is not None
        async for line in self._child.stdout:
            word = line.decode(errors="replace").partition(" ")[0].strip()
            if word == READY:
                self.ready.set()
            elif word == DRAINS:
                self.drains = True
                self.leaving.set()
        code = await self._child.wait()
        self.leaving.set()
        return code


@dataclass(slots=True)
class _Place:
    """A place among the processes: its socket, and the process that accepts from it."""

    listener: socket.socket | None = None
    process: FrontendProcess | None = None
    began: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once a process of this place has been ready."""
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def serves(self) -> bool:
        """True while its process accepts connections."""
        process = self.process
        return process is not None and process.ready.is_set() and not process.drains

    def close(self) -> None:
        if self.listener is not None:
            self.listener.close()
            self.listener = None


class FrontendProcesses:
    """Runs frontend processes on one port until SIGTERM or SIGINT. Call `run` once.

    A process that dies is started again, after a pause that grows from 0.5 s to 10 s; one that hangs for long
    is killed. One that is sent SIGTERM gets a successor at once. SIGHUP replaces all, one after another.
    """

    def __init__(
        self,
        port: SharedPort,
        count: int,
        siblings: Path,
        env: Mapping[str, str],
        drain_s: float,
        stall_s: float,
    ) -> None:
        """`siblings` is a directory for sockets among the processes, `env` their environment, `drain_s` the
        longest time of their shutdown. A process that hangs for `stall_s` is replaced; 0: never."""
        self._port = port
        self._siblings = siblings
        self._started_at = time.monotonic()
        self._env = env
        self._grace_s = drain_s + GRACE_BEYOND_DRAIN_S
        self._stall_s = stall_s
        self._places = [_Place() for _ in range(count)]
        self._running: set[FrontendProcess] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._replacing: asyncio.Task[None] | None = None
        self._is_to_replace_again = False
        self._stopping = asyncio.Event()
        self._second_signal: signal.Signals | None = None

    async def run(self, on_ready: Callable[[str], None]) -> int:
        """Serve until a signal, then drain. Return the exit code.

        `on_ready` is called with the URL once all processes serve. A process that ends while the first one
        starts ends the command, with its exit code.
        """
        loop = asyncio.get_running_loop()
        ends_with_terminal = sys.stdin is not None and sys.stdin.isatty()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        if ends_with_terminal:
            loop.add_signal_handler(signal.SIGHUP, self._stop, signal.SIGHUP)
        else:
            loop.add_signal_handler(signal.SIGHUP, self._replace)
        starting = asyncio.create_task(self._start(on_ready))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done() and (code := starting.result()):
                return code
            await stopping
        finally:
            for task in (starting, stopping, *self._tasks):
                task.cancel()
            await asyncio.gather(starting, stopping, *self._tasks, return_exceptions=True)
            codes = await self._drain()
        if self._second_signal is not None:
            return 128 + self._second_signal
        return next((1 for code in codes if code not in (0, -signal.SIGTERM)), 0)

    def health(self) -> tuple[int, dict[str, Any]]:
        """Return status and body of `/health`: 200 while each place has a process that serves."""
        serving = [process.pid for process in self._serving() if process.silent_since is None]
        missing_count = len(self._places) - len(serving)
        reasons = [f"{missing_count} of {len(self._places)} processes do not serve"] if missing_count else []
        now = time.monotonic()
        reasons += [
            f"process {process.pid} has not answered for {now - process.silent_since:.0f} s"
            for process in self._serving()
            if process.silent_since is not None
        ]
        if self._stopping.is_set():
            reasons.insert(0, "the process is shutting down")
        uptime_s = time.monotonic() - self._started_at
        body: dict[str, Any] = {
            "status": "notready" if reasons else "ready",
            "uptime": {"secs": int(uptime_s), "nanos": int(uptime_s % 1 * 1e9)},
            "endpoints": {},
            "processes": serving,
        }
        if reasons:
            body["reasons"] = reasons
        return (503 if reasons else 200), body

    def _serving(self) -> list[FrontendProcess]:
        """Return the processes that accept connections."""
        return [place.process for place in self._places if place.serves and place.process is not None]

    async def _start(self, on_ready: Callable[[str], None]) -> int:
        """Start the first process, then all. Return the exit code of the first one if it does not start."""
        first = await self._launch(self._places[0])
        if not await first.until_ready():
            code = await first.ended
            if code < 0:
                raise CommandFailed(f"the first frontend process {_describe_end(code)} while it started")
            return code or 1
        for index, place in enumerate(self._places):
            supervisor = Supervisor(log, f"frontend process {index + 1}", pauses_s=_PAUSES_S)
            self._run(supervisor.run(partial(self._keep, place)))
        supervisor = Supervisor(log, "watch of the frontend processes")
        self._run(supervisor.run(partial(watch, self._serving, self._siblings, self._stall_s)))
        for place in self._places:
            await place.began.wait()
        on_ready(self._port.url)
        return 0

    async def _keep(self, place: _Place) -> None:
        """Keep a process running at a place. Raises CommandFailed once it has died."""
        if place.process is None:
            await self._launch(place)
        while True:
            process = place.process
            assert process is not None
            if await process.until_ready():
                place.began.set()
            await process.leaving.wait()
            async with place.changing:
                if place.process is not process:
                    continue
                if not process.drains:
                    place.close()
                    place.process = None
                    raise CommandFailed(f"process {process.pid} {_describe_end(await process.ended)}")
                log.info("frontend process %d drains: starting another in its place", process.pid)
                await self._launch(place)

    async def _launch(self, place: _Place) -> FrontendProcess:
        """Start a process at a place, which becomes the place's."""
        place.process = await self._start_process(place)
        return place.process

    async def _start_process(self, place: _Place) -> FrontendProcess:
        if place.listener is None:
            place.listener = self._port.open()
        process = await FrontendProcess.start(place.listener, self._siblings, self._env)
        self._running.add(process)
        process.ended.add_done_callback(lambda _: self._running.discard(process))
        return process

    # ----------------------------------------------------------------- signals

    def _stop(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            self._second_signal = number
            for process in self._running:
                process.kill()
            return
        log.info("%s: the frontend processes drain; a second signal ends them at once", number.name)
        self._stopping.set()

    def _replace(self) -> None:
        if self._stopping.is_set():
            return
        if self._replacing is not None and not self._replacing.done():
            log.info("SIGHUP: the frontend processes will be replaced once more, after this replacement")
            self._is_to_replace_again = True
            return
        self._replacing = self._run(self._replace_all())

    async def _replace_all(self) -> None:
        """Replace the processes one after another. Each serves until its successor does.

        A signal that comes meanwhile may announce a change that the first successors have not seen: all are
        then replaced again.
        """
        while True:
            self._is_to_replace_again = False
            log.info("SIGHUP: replacing the frontend processes, one after another")
            if await self._replace_each():
                log.info("all frontend processes are replaced")
            if not self._is_to_replace_again:
                return

    async def _replace_each(self) -> bool:
        """Replace the process of each place. Return False if a successor does not start.

        A place whose process has died is left out: the next one there is a new one anyway.
        """
        for place in self._places:
            await place.began.wait()
            async with place.changing:
                old = place.process
                if old is not None and not await self._succeed(place, old):
                    return False
            if old is not None:
                old.terminate()
                await old.wait(self._grace_s)
        return True

    async def _succeed(self, place: _Place, old: FrontendProcess) -> bool:
        """Start a successor of a process. Return False if it does not start: the old one goes on then."""
        try:
            new = await self._start_process(place)
        except OSError as exc:
            log.error("no successor of frontend process %d can be started: %s", old.pid, exc)
            return False
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                if await new.until_ready():
                    place.process = new
                    return True
            end = _describe_end(await new.ended)
        except TimeoutError:
            end = f"was not ready within {START_TIMEOUT_S:g} s"
        finally:
            if place.process is not new:
                new.kill()
        log.error("the successor of frontend process %d %s: the present processes go on", old.pid, end)
        return False

    async def _drain(self) -> Sequence[int]:
        """End all processes. Return their exit codes.

        This process's copies of the sockets are closed first. So the port is free once the last process has
        accepted the connections that have arrived.
        """
        for place in self._places:
            place.close()
        self._port.close()
        for process in (running := list(self._running)):
            process.terminate()
        return await asyncio.gather(*(process.wait(self._grace_s) for process in running))

    def _run(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _describe_end(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


# --------------------------------------------------------------------------- in the frontend process


def end_with_parent(siblings: Path, drain_s: float) -> None:
    """Let this process drain once its standard input ends, and end at the latest some seconds after that.

    A second SIGTERM, while it drains already, ends it at once. The directory `siblings` is removed, as the
    parent process would have done.
    """

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        shutil.rmtree(siblings, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(drain_s + GRACE_BEYOND_DRAIN_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent's end", daemon=True).start()


def announce_drain() -> None:
    """Print the line that has the parent process start a successor."""
    with suppress(OSError):  # the parent has gone
        print_line(DRAINS)
