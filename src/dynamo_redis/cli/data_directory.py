"""Where the embedded Redis of `up` keeps its data: held by one `up` at a time, and cleared away after it.

A temporary directory whose `up` was killed stays behind; the next `up` of the user removes it. Whether an
`up` still runs is told by its lock, which ends with it however it ends. A directory gets the name by which
others look for it only when it is locked, so none ever sees one that is about to be.
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
_ANSWER_S = 1.0


@contextmanager
def data_directory(chosen: Path | None) -> Iterator[Path]:
    """`chosen`, or a temporary directory that ends with the block. Raises CommandFailed if it is in use."""
    if chosen is None:
        remove_abandoned(Path(tempfile.gettempdir()))
        with _temporary() as directory:
            yield directory
        return
    chosen.mkdir(parents=True, exist_ok=True)
    with (chosen / "up.lock").open("w") as lock:
        if not _take(lock.fileno()):
            raise CommandFailed(f"{chosen} is in use by another `dynamo-redis up`")
        yield chosen


def remove_abandoned(parent: Path) -> None:
    """Remove this user's temporary directories whose `up` and Redis have ended. Never raises OSError."""
    for directory in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # just went away, or is not ours to open
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                ours = os.fstat(lock).st_uid == os.getuid()
                if ours and _take(lock) and not _answers(directory / "redis.sock"):
                    shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(lock)


@contextmanager
def _temporary() -> Iterator[Path]:
    draft = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
    directory = draft.with_name(draft.name.removeprefix("."))
    try:
        _take(lock)  # nobody else knows of it
        draft.rename(directory)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _take(descriptor: int) -> bool:
    """Lock an open file or directory until it is closed; False if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _answers(path: Path) -> bool:
    """Whether a server still listens at a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_ANSWER_S)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
