"""Child processes that never outlive their parent.

A child runs in a session of its own: Ctrl-C in the terminal reaches only the parent, which then stops its
children in its own order. In the child's process group sits a small `sh` watchdog that reads a pipe whose
other end only the parent holds, the *lifeline*. The pipe ends with the parent, also after kill -9 or the
kernel's out-of-memory killer, and then the watchdog kills the whole group. This needs only POSIX
(`prctl(PR_SET_PDEATHSIG)` exists only on Linux, and fires when the starting *thread* ends).

The watchdog starts before the child's program, so the parent's death never leaves an orphan. As a member of
the group it also keeps the group's id from being used again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

import anyio

# Descriptor 3 keeps the lifeline, because a shell gives its background jobs /dev/null as standard input.
# The outer parentheses make the watchdog a child of init: a program never sees a child it did not start.
# It ignores the signals that a terminal or a graceful stop may send to the group, and holds no output pipe
# open.
_WATCHED = """
exec 3<&0 </dev/null
( (
    trap '' HUP INT QUIT TERM
    exec >/dev/null 2>&1
    while read -r _ <&3; do :; done
    kill -s KILL 0
) & )
exec "$@" 3<&-
"""

_FIRST_POLL_S = 0.002
_LAST_POLL_S = 0.05

Output = int | IO[bytes] | None
"""Destination of output: inherited (None), a file, or `subprocess.DEVNULL`."""


class ChildProcess:
    """A running program, its process group, and the lifeline that ties both to this process.

    It is bound to no event loop: start it in one, wait for it in another. `wait` polls (2 to 50 ms), which
    needs neither a thread nor a SIGCHLD handler. A child that is not waited for is a zombie until
    `returncode` is read, as with `subprocess.Popen`.

    The lifeline is inherited by processes that this one forks *without* exec (`multiprocessing` with
    "fork"): children then live until those are gone, too.
    """

    def __init__(self, process: subprocess.Popen[bytes], lifeline: int) -> None:
        self._process = process
        self._lifeline: int | None = lifeline

    @classmethod
    def start(
        cls,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdout: Output = None,
        stderr: Output = None,
    ) -> Self:
        """Run `argv` (the first is a path or found on PATH), with `env` instead of this process's if given.

        Its standard input is empty. Raises OSError when no shell can be started; a program that cannot be
        run shows as `returncode` 126 or 127, with the shell's message on its standard error.
        """
        theirs, ours = os.pipe()
        try:
            process = subprocess.Popen(  # noqa: S603 (the caller's own command, no shell expansion)
                ["/bin/sh", "-c", _WATCHED, "sh", *map(str, argv)],
                stdin=theirs,
                stdout=stdout,
                stderr=stderr,
                env=None if env is None else dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return cls(process, ours)

    @property
    def pid(self) -> int:
        """Process id, and id of the process group."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; then its exit code, or minus the signal that killed it."""
        code = self._process.poll()
        if code is not None:
            self._release()
        return code

    def send_signal(self, number: int) -> None:
        """Signal the program itself (not its group); nothing happens if it has ended."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the whole process group at once. Reap it with `wait`."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            if self._process.poll() is None:
                os.killpg(self.pid, signal.SIGKILL)
        self._release()

    async def wait(self, timeout_s: float | None = None) -> int:
        """Wait until the process has ended and return its `returncode`.

        Raises TimeoutError. Cancelling the call leaves the process running."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause_s = _FIRST_POLL_S
        while (code := self.returncode) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"process {self.pid} still runs after {timeout_s:g} s")
            await anyio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LAST_POLL_S)
        return code

    async def stop(self, grace_s: float = 5.0, *, number: int = signal.SIGTERM) -> int:
        """Send the signal `number`, kill the process group after `grace_s`, and return the `returncode`.

        Idempotent. Processes that the child left behind in its group are killed, too. Cancelling the call
        kills the group at once.
        """
        try:
            self.send_signal(number)
            return await self.wait(grace_s)
        except TimeoutError:
            self.kill()
            return await self.wait()
        except BaseException:
            self.kill()
            self._process.wait()  # a killed process is gone at once
            raise

    def _release(self) -> None:
        """Close the lifeline: the watchdog then kills the rest of the group, and itself."""
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def __del__(self) -> None:
        self._release()

    def __repr__(self) -> str:
        code = self._process.returncode
        return f"<ChildProcess {self.pid} {'running' if code is None else f'ended with {code}'}>"
