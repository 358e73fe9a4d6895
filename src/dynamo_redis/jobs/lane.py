"""The event loop's side of jobs: runs them in a separate process, one after the other.

The loop never blocks on the process: it writes when the socket has room, and reads answers as they arrive.
Some jobs are written ahead, so that the process does not wait for the loop between two jobs. The job in
progress has a time limit. When that has passed, or when the process ends by itself, the job fails, and the
jobs after it go to a new process.
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
from contextvars import Context
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
    """Base: a job has no answer."""


class JobOverrun(JobError):
    """The job ran longer than its time limit."""


class JobDied(JobError):
    """The process ended during the job, mostly for lack of memory."""


class NoProcess(JobError):
    """The process could not be started."""


class FirstJobRefused(JobError):
    """The process started, but its first job failed, so it is of no use."""


class QueueFull(JobError):
    """The limit of waiting jobs is reached."""


class Lane:
    """Runs jobs in a separate process, which starts with the first job and ends after `idle_s` without one.

    While there is a process, a task of this class owns it; `aclose` ends both.
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
        """Make a lane without a process.

        Args:
            command: Command line of the process.
            time_s: Processor time of one job, which the process itself limits.
            idle_s: Time without a job after which the process ends.
            queue_count: Most jobs that wait or run.
            ahead_count: Most jobs that are written and not yet answered.
            first_job: Job that each process gets first.
            check_first: Called with the answer to `first_job`; raises FirstJobRefused.
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
        """Id of the process that takes jobs now, or None."""
        return None if self._process is None else self._process.popen.pid

    @property
    def is_running(self) -> bool:
        """True while there is a process, or one is being started."""
        return self._running is not None and not self._running.done()

    @property
    def job_count(self) -> int:
        """Number of jobs that wait or run."""
        return len(self._waiting) + (0 if self._process is None else len(self._process.sent))

    async def run(self, *pieces: bytes | bytearray) -> bytearray:
        """Run a job, which consists of the joined pieces, and return its answer. Raises JobError.

        Cancelling the call drops a job that is not yet written. A job in progress goes on to its end or its
        time limit.
        """
        if self.job_count >= self._queue_count:
            raise QueueFull(f"{self._queue_count} wait already")
        job = _Job(pieces)
        del pieces
        self._waiting.append(job)
        if not self.is_running:
            # It goes on after the request that begins it, whose context variables are not its own.
            self._running = asyncio.create_task(
                self._run(), name=f"jobs of {self._command[-1]}", context=Context()
            )
        self._send_waiting()
        try:
            return await job.answer
        except asyncio.CancelledError:
            job.pieces = ()
            with suppress(ValueError):  # it was sent
                self._waiting.remove(job)
            raise

    async def aclose(self) -> None:
        """Kill the process, and fail the waiting jobs. Idempotent."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    # ----------------------------------------------------------------- the task

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
        """Start a process, and send it jobs until it ends, or has had none for `idle_s`."""
        process = await _Process.start(self._command, self._limit_s, self._send_waiting)
        try:
            if self._first_job is not None:
                process.send(first := _Job((self._first_job,)))
                awaited: set[asyncio.Future[Any]] = {first.answer, process.ended}
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if not first.answer.done():
                    first.fail(await process.kill())
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
                error = await process.kill()
            finally:
                if begun is not None:
                    begun.fail(error)

    def _send_waiting(self) -> None:
        process = self._process
        while process is not None and self._waiting and len(process.sent) < self._ahead_count:
            job = self._waiting.popleft()
            if not job.answer.done():  # else its call was cancelled
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
    """One process, its socket, and the jobs that were sent to it and are not answered."""

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

        def spawn() -> tuple[subprocess.Popen[bytes], socket.socket]:
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

        loop = asyncio.get_running_loop()
        starting = loop.run_in_executor(None, spawn)
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
            await process.kill()
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
        self.sent[0].pieces = ()  # if the process dies, the job in progress is not sent again

    def _check_time(self) -> None:
        self._timer = None
        if not self.sent or self.ended.done():
            return
        if self._loop.time() < self._begun_at + self._limit_s:  # another job is in progress by now
            self._timer = self._loop.call_at(self._begun_at + self._limit_s, self._check_time)
            return
        self._is_late = True
        self.popen.kill()

    async def kill(self) -> JobError:
        """Kill the process if it lives, and return the error for the job in progress."""
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
        """Keep the transport of the process's socket."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the process has ended, or closed its socket."""
        if not self.ended.done():
            self.ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Read a part of an answer, or several answers."""
        view = memoryview(data)
        while view:
            if len(self._head) < FRAME.size:
                taken = FRAME.size - len(self._head)
                self._head += view[:taken]
                view = view[taken:]
                if len(self._head) < FRAME.size:
                    return
                self._size = FRAME.unpack(self._head)[0]
                if not self.sent or self._size > _MOST_ANSWER_BYTES:  # the process broke the protocol
                    self.popen.kill()
                    return
            taken = self._size - len(self._answer)
            self._answer += view[:taken]
            view = view[taken:]
            if len(self._answer) == self._size:
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
    """Return the environment of a process that handles untrusted input.

    It has the variables that Python needs to start, and none that may hold a password, such as
    DYN_REDIS_URL."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT_NAMES}
    return kept | {"RUST_BACKTRACE": "0"}  # a backtrace taken without memory can deadlock
