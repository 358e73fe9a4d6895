"""Looks whether the frontend processes answer: one that hangs keeps its share of the connections."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from dynamo_redis.frontend.http.siblings import answers

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Pause between two looks, in seconds."""


class Watched(Protocol):
    """The part of a frontend process that is needed here."""

    silent_since: float | None
    """When it was first found silent, on `time.monotonic`; None: it answers."""

    @property
    def pid(self) -> int: ...
    def kill(self) -> None: ...


async def watch(serving: Callable[[], Sequence[Watched]], siblings: Path, stall_s: float) -> None:
    """Ask the serving processes for a sign of life each second, until cancelled.

    One that has given none for `stall_s` is killed; 0: never. `siblings` is the directory of their sockets.
    """
    while True:
        await asyncio.sleep(LOOK_S)
        processes = serving()
        found = await asyncio.gather(*(answers(siblings, process.pid) for process in processes))
        for process, is_answered in zip(processes, found, strict=True):
            _note(process, is_answered, stall_s)


def _note(process: Watched, is_answered: bool, stall_s: float) -> None:
    now = time.monotonic()
    if is_answered:
        if process.silent_since is not None:
            log.info("frontend process %d answers again", process.pid)
        process.silent_since = None
    elif process.silent_since is None:
        log.warning("frontend process %d does not answer: its event loop hangs", process.pid)
        process.silent_since = now
    elif stall_s and now - process.silent_since > stall_s:
        log.error("frontend process %d has not answered for %g s: killing it", process.pid, stall_s)
        process.kill()
