"""A TLS context from files that is made again when they have changed."""

from __future__ import annotations

import logging
import ssl
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dynamo_redis.clock import SYSTEM_CLOCK, Clock
from dynamo_redis.errors import ConfigError

LOOK_S: Final = 1.0
"""Seconds for which a changed file may go unnoticed while connections are made."""

_log = logging.getLogger(__name__)


class ReloadedContext(ABC):
    """A TLS context of this process. Its files are looked at when a connection is made."""

    def __init__(self, files: Sequence[Path | None], owner: str, clock: Clock = SYSTEM_CLOCK) -> None:
        """Read the files. `owner` is named in the log. Raises ConfigError if they cannot be used."""
        self._paths = [path for path in files if path is not None]
        self._owner = owner
        self._clock = clock
        self._seen = self._refused = stamp_of(self._paths)
        self._context = self._make()
        self._look_at = clock.monotonic() + LOOK_S

    def current(self) -> ssl.SSLContext:
        """Return the context for the next connection; reload changed files first."""
        now = self._clock.monotonic()
        if now < self._look_at:
            return self._context
        self._look_at = now + LOOK_S
        found = stamp_of(self._paths)
        if found == self._seen:
            return self._context
        try:
            self._context = self._make()
        except ConfigError as exc:
            if found != self._refused:
                self._refused = found
                _log.error("%s; the %s goes on with the certificates it had", exc, self._owner)
        else:
            self._seen = self._refused = found
            _log.info("the %s takes up changed certificates", self._owner)
        return self._context

    @abstractmethod
    def _make(self) -> ssl.SSLContext:
        """Make a context from the files. Raises ConfigError."""


def stamp_of(paths: Sequence[Path]) -> tuple[object, ...]:
    """Return a value that changes when a file changes, or its permissions, or a symbolic link to it."""
    stamps: list[tuple[int, ...] | None] = []
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            stamps.append(None)
        else:
            times = found.st_mtime_ns, found.st_ctime_ns
            stamps.append((found.st_dev, found.st_ino, found.st_size, *times))
    return tuple(stamps)
