"""The side of the event loop: jobs for a process of their own, one after the other.

The loop never waits for the process: it writes what the socket takes, and reads answers as they come. Jobs
are written ahead of time, so that the process need not wait for the loop between two of them. The job that it
works on has a time limit. Past it, or when the process ends by itself, that job fails, and those behind it go
to a new process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, cast

from dynamo_redis.jobs.serving import FRAME, WALL_FACTOR

_MOST_ANSWER_BYTES: Final = 1 << 28

_KEPT_NAMES: Final = frozenset(
    [
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "DYLD_LIBRARY_PATH",
        "PYTHONHOME",
        "PYTHONPATH",
        "PYTHONUTF8",
        "VIRTUAL_ENV",
        "SYSTEMROOT",
    ]
)


class JobError(Exception):
    """A job came to no answer."""


class JobOverrun(JobError):
    """It ran for longer than it may."""


class JobDied(JobError):
    """The process ended while it worked on the job: most often for want of memory."""


class NoProcess(JobError):
    """No process can be started now."""


class FirstJobRefused(JobError):
    """The process started, but cannot do what it is for."""


class QueueFull(JobError):
    """As many jobs wait as may."""


class Lane:
    """Does jobs in a process of its own, which starts with a job, and ends after `idle_s` without one.

    Owns a task while there is a process, which `aclose` ends.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        time_s: float,
        idle_s: float,
        queue_count: int,
        ahead_count: int = 1,
        first_job: bytes | None = None,
        check_first: Callable[[bytearray], None] = lambda _: None,
    ) -> None:
        """`time_s` is the processor time of one job, as the process itself keeps it. Every process is told
        `first_job` before others; `check_first` gets the answer, and raises FirstJobRefused. `ahead_count`
        jobs are written before the first of them is answered; `queue_count` is the most that there are.
        """
        self._command = command
        self._limit_s = time_s * WALL_FACTOR
        self._idle_s = idle_s
        self._queue_count = queue_count
        self._ahead_count = ahead_count
        self._first_job = first_job
        self._check_first = check_first
        self._waiting: deque[_Job] = deque()
        self._process: _Process | None = None
        self._running: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process's id, while one works."""
        return None if self._process is None else self._process.popen.pid

    @property
    def is_running(self) -> bool:
        """Whether a process is there, or about to be."""
        return self._running is not None and not self._running.done()

    @property
    def job_count(self) -> int:
        """The number of jobs that wait or are worked on."""
        return len(self._waiting) + (0 if self._process is None else len(self._process.sent))

    async def run(self, *pieces: bytes | bytearray) -> bytearray:
        """Do a job, which the process gets in one piece, and return its answer. Raises JobError.

        A caller that is cancelled gives up the answer, and its place if the job is not begun; one that is
        ends by itself, or at its limit.
        """
        if self.job_count >= self._queue_count:
            raise QueueFull(f"{self._queue_count} wait already")
        job = _Job(pieces)
        del pieces
        self._waiting.append(job)
        self._ensure_running()
        self._send_waiting()
        try:
            return await job.answer
        except asyncio.CancelledError:
            self._give_up(job)
            raise

    def _give_up(self, job: _Job) -> None:
        job.pieces = ()
        with suppress(ValueError):  # it was sent
            self._waiting.remove(job)

    async def aclose(self) -> None:
        """Kill the process, and fail the jobs that wait. Idempotent."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    # ----------------------------------------------------------------- the task

    def _ensure_running(self) -> None:
        if not self.is_running:
            self._running = asyncio.create_task(self._run(), name=f"jobs of {self._command[-1]}")

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._use_a_process()
        except JobError as exc:
            self._fail_waiting(exc)
        except BaseException:
            self._fail_waiting(JobDied("its process was ended"))
            raise

    async def _use_a_process(self) -> None:
        """Start a process, and give it jobs until it ends, or has had none for a while."""
        process = await _Process.start(self._command, self._limit_s, self._send_waiting)
        try:
            if self._first_job is not None:
                process.send(first := _Job((self._first_job,)))
                awaited: set[asyncio.Future[Any]] = {first.answer, process.ended}
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if not first.answer.done():
                    first.fail(await process.bury())
                self._check_first(first.answer.result())
            self._process = process
            self._send_waiting()
            answer_count = -1
            while not process.ended.done() and (process.sent or answer_count != process.answer_count):
                answer_count = process.answer_count
                await asyncio.wait({process.ended}, timeout=self._idle_s)
        finally:
            self._process = None
            begun = process.sent.popleft() if process.sent else None
            self._waiting.extendleft(reversed(process.sent))
            error: JobError = JobDied("its process was ended")
            try:
                error = await process.bury()
            finally:
                if begun is not None:
                    begun.fail(error)

    def _send_waiting(self) -> None:
        process = self._process
        while process is not None and self._waiting and len(process.sent) < self._ahead_count:
            job = self._waiting.popleft()
            if not job.answer.done():  # else its caller has left
                process.send(job)

    def _fail_waiting(self, error: JobError) -> None:
        while self._waiting:
            self._waiting.popleft().fail(error)


class _Job:
    __slots__ = ("answer", "pieces")

    def __init__(self, pieces: Sequence[bytes | bytearray]) -> None:
        self.pieces = pieces
        self.answer: asyncio.Future[bytearray] = asyncio.get_running_loop().create_future()

    def fail(self, error: JobError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class _Process(asyncio.Protocol):
    """One process, its socket, and the jobs that were written to it and are not answered."""

    def __init__(self, popen: subprocess.Popen[bytes], limit_s: float, on_answer: Callable[[], None]) -> None:
        self.popen = popen
        self.sent: deque[_Job] = deque()
        self.answer_count = 0
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._limit_s = limit_s
        self._on_answer = on_answer
        self._is_late = False
        self._begun_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._head = bytearray()
        self._size = 0
        self._answer = bytearray()

    @classmethod
    async def start(cls, command: Sequence[str], limit_s: float, on_answer: Callable[[], None]) -> _Process:
        """Start a process. `on_answer` is called after each answer. Raises NoProcess."""
        loop = asyncio.get_running_loop()
        starting = loop.run_in_executor(None, _spawn, command)
        try:
            popen, ours = await asyncio.shield(starting)
        except OSError as exc:
            raise NoProcess(exc.strerror or str(exc)) from exc
        except asyncio.CancelledError:
            popen, ours = await starting
            ours.close()
            popen.kill()
            await loop.run_in_executor(None, popen.wait)
            raise
        process = cls(popen, limit_s, on_answer)
        try:
            await loop.connect_accepted_socket(lambda: process, ours)
        except BaseException:
            ours.close()
            await process.bury()
            raise
        return process

    def send(self, job: _Job) -> None:
        """Write a job."""
        assert self._transport is not None
        if not self.sent:
            self._begun_at = self._loop.time()
        self.sent.append(job)
        if self._timer is None:
            self._timer = self._loop.call_at(self._begun_at + self._limit_s, self._check_time)
        self._transport.writelines([FRAME.pack(sum(map(len, job.pieces))), *job.pieces])
        self.sent[0].pieces = ()  # should the process die, this one is not sent again

    def _check_time(self) -> None:
        self._timer = None
        if not self.sent or self.ended.done():
            return
        if self._loop.time() < self._begun_at + self._limit_s:  # another job is the first by now
            self._timer = self._loop.call_at(self._begun_at + self._limit_s, self._check_time)
            return
        self._is_late = True
        self.popen.kill()

    async def bury(self) -> JobError:
        """Kill the process if it lives, and return why the job that it worked on has no answer."""
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        if self.popen.returncode is None:
            self.popen.kill()
        code = await asyncio.shield(self._loop.run_in_executor(None, self.popen.wait))
        if self._is_late or code == -signal.SIGXCPU:
            return JobOverrun("it ran for too long")
        return JobDied(f"its process ended with {code}")

    # ----------------------------------------------------------------- the socket

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The process has its socket."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name

    def connection_lost(self, exc: Exception | None) -> None:
        """The process has ended, or its socket is of no use any more."""
        if not self.ended.done():
            self.ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Part of an answer, or several."""
        view = memoryview(data)
        while view:
            if len(self._head) < FRAME.size:
                taken = FRAME.size - len(self._head)
                self._head += view[:taken]
                view = view[taken:]
                if len(self._head) < FRAME.size:
                    return
                self._size = FRAME.unpack(self._head)[0]
                if not self.sent or self._size > _MOST_ANSWER_BYTES:  # not what the process was made to write
                    self.popen.kill()
                    return
            taken = self._size - len(self._answer)
            self._answer += view[:taken]
            view = view[taken:]
            if len(self._answer) == self._size:
                self._take_answer()

    def _take_answer(self) -> None:
        answer, self._answer = self._answer, bytearray()
        self._head.clear()
        self.answer_count += 1
        job = self.sent.popleft()
        self._begun_at = self._loop.time()
        if self.sent:
            self.sent[0].pieces = ()
        if not job.answer.done():
            job.answer.set_result(answer)
        self._on_answer()


def job_environment() -> dict[str, str]:
    """The environment of a process that works on what strangers sent: what Python needs to start, and nothing
    that may hold a password, such as DYN_REDIS_URL."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT_NAMES}
    return kept | {"RUST_BACKTRACE": "0"}  # taking one without memory can wait for itself


def _spawn(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            popen = subprocess.Popen(  # noqa: S603 - a module of this package
                command,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env=job_environment(),
                start_new_session=True,  # Ctrl-C in the terminal is its parent's
            )
        except BaseException:
            ours.close()
            raise
    ours.setblocking(False)
    return popen, ours
