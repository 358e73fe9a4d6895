"""The data directory of the embedded Redis of `up`: used by one `up` at a time, removed if temporary.

A killed `up` leaves its temporary directory behind; the user's next `up` removes it. A lock on the directory
shows that its `up` still runs: the kernel releases the lock when the process ends. A directory is renamed to
the name that other processes search for only after it is locked, so no process finds it unlocked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dynamo_redis.cli.failures import CommandFailed

_PREFIX = "dynamo-redis-up-"
_CONNECT_TIMEOUT_S = 1.0


@contextmanager
def data_directory(chosen: Path | None) -> Iterator[Path]:
    """Lock `chosen`, or make a temporary directory and remove it at the end of the block.

    Raises CommandFailed if `chosen` is in use.
    """
    if chosen is None:
        remove_abandoned(Path(tempfile.gettempdir()))
        draft = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
        held = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
        directory = draft.with_name(draft.name.removeprefix("."))
        try:
            _lock(held)  # succeeds: no other process knows the directory
            draft.rename(directory)
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(held)
        return
    chosen.mkdir(parents=True, exist_ok=True)
    with (chosen / "up.lock").open("w") as lock:
        if not _lock(lock.fileno()):
            raise CommandFailed(f"{chosen} is in use by another `dynamo-redis up`")
        yield chosen


def remove_abandoned(parent: Path) -> None:
    """Remove this user's temporary directories if their `up` and Redis have ended. Never raises OSError."""
    for directory in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it was just removed, or this user may not open it
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                ours = os.fstat(lock).st_uid == os.getuid()
                if ours and _lock(lock) and not _is_listening(directory / "redis.sock"):
                    shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(lock)


def _lock(descriptor: int) -> bool:
    """Lock an open file or directory until it is closed; False if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_listening(path: Path) -> bool:
    """Return whether a server listens at a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
