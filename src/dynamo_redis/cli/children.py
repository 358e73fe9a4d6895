"""A service as a child process: its readiness, its log lines, its error, its end.

Buffers: the last 20 lines of a child's log are kept. A line over 64 KiB is cut into pieces of that size.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dynamo_redis.child import ChildProcess
from dynamo_redis.cli.app import PROGRAM
from dynamo_redis.cli.service import READY

_LINES_KEPT = 20
_LINE_LIMIT_BYTES = 64 << 10
_OWN_ERROR = f"{PROGRAM}: "

LineSink = Callable[[str, str], None]
"""Called with (service's name, line) for each line that a child logs."""


@dataclass(frozen=True, slots=True)
class ServiceCommand:
    """A command of this program that runs as a process of its own."""

    name: str
    arguments: tuple[str, ...]

    @property
    def argv(self) -> list[str]:
        """The command line: this interpreter, without the working directory among its modules (`-P`)."""
        return [sys.executable, "-P", "-m", "dynamo_redis", *self.arguments]


class ServiceProcess:
    """One run of a service. Start it, wait until it is `ready`, wait for its `ended`, or `stop` it."""

    def __init__(self, service: ServiceCommand, child: ChildProcess, log: LineSink) -> None:
        self.service = service
        self._child = child
        self._log = log
        self._last_lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._own_error: str | None = None
        self._ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._transports: list[asyncio.ReadTransport] = []
        self._outputs: list[_Lines] = []

    @classmethod
    async def start(cls, service: ServiceCommand, env: Mapping[str, str], log: LineSink) -> ServiceProcess:
        """Start the service with this environment. Raises OSError if no process can be started."""
        (out, theirs_out), (err, theirs_err) = os.pipe(), os.pipe()
        try:
            child = ChildProcess.start(service.argv, env=env, stdout=theirs_out, stderr=theirs_err)
        except BaseException:
            os.close(out)
            os.close(err)
            raise
        finally:
            os.close(theirs_out)
            os.close(theirs_err)
        process = cls(service, child, log)
        await process._read(out, process._on_output)
        await process._read(err, process._on_log)
        return process

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    @property
    def is_ready(self) -> bool:
        """True once the service has printed that it serves."""
        return self._ready.done()

    async def ready(self) -> str:
        """Wait until it serves. Return the text of its ready line (a frontend: its URL).

        Cancellation-safe. Waits for ever if the process ends before: wait for `ended` at the same time.
        """
        return await asyncio.shield(self._ready)

    async def ended(self) -> int:
        """Wait until the process has ended and its output is read. Return the exit code."""
        code = await self._child.wait()
        for output in self._outputs:
            await output.closed
        return code

    async def stop(self, grace_s: float) -> int:
        """Send SIGTERM, and SIGKILL after `grace_s`. Return the exit code."""
        code = await self._child.stop(grace_s)
        for transport in self._transports:
            transport.close()
        return code

    def kill(self) -> None:
        """Send SIGKILL."""
        self._child.kill()

    def last_words(self) -> str:
        """Return its error line (`dynamo-redis: …`) if it printed one, else the last line that it logged."""
        if self._own_error is not None:
            return self._own_error
        return self._last_lines[-1] if self._last_lines else "it logged nothing"

    def last_lines(self) -> Sequence[str]:
        """Return the last lines that it logged, oldest first."""
        return tuple(self._last_lines)

    async def _read(self, descriptor: int, on_line: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        transport, lines = await loop.connect_read_pipe(
            lambda: _Lines(on_line, loop.create_future()), os.fdopen(descriptor, "rb", 0)
        )
        self._transports.append(transport)
        self._outputs.append(lines)

    def _on_output(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == READY and not self._ready.done():
            self._ready.set_result(rest)

    def _on_log(self, line: str) -> None:
        self._last_lines.append(line)
        if line.startswith(_OWN_ERROR):
            self._own_error = line.removeprefix(_OWN_ERROR)
        else:
            self._log(self.service.name, line)


class _Lines(asyncio.Protocol):
    """Splits the bytes of a pipe into lines."""

    def __init__(self, on_line: Callable[[str], None], closed: asyncio.Future[None]) -> None:
        self._on_line = on_line
        self._rest = b""
        self.closed = closed

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._emit(line)
        if len(self._rest) > _LINE_LIMIT_BYTES:
            self._emit(self._rest)
            self._rest = b""

    def connection_lost(self, exc: Exception | None) -> None:
        self._emit(self._rest)
        if not self.closed.done():
            self.closed.set_result(None)

    def _emit(self, line: bytes) -> None:
        for start in range(0, len(line), _LINE_LIMIT_BYTES):
            text = line[start : start + _LINE_LIMIT_BYTES].decode(errors="replace").rstrip()
            if text:
                self._on_line(text)
