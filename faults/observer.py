"""The truth: every entry of the change log, read directly from each server and written into the history.

An entry is identified by its id *and* operation. When a server's history is rewound, or its registry made
anew, the log is read again from its beginning, and entries that are new for that server are written. So the
notes of one server are a tree. A branch leaves the tree at an entry's `previous`.

Faults that destroy history run through `read_and_run`, which reads new entries and destroys in one MULTI, or
after `catch_up` while writes are held back. So the notes have no holes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from dynamo_redis.errors import StoreError
from dynamo_redis.store.keys import RegistryKeys
from faults.history import Recorder, recorded_value
from faults.servers import ServerUnderTest, Word

POLL_S: Final = 0.1
_FIELDS: Final = frozenset({b"o", b"k", b"v", b"l", b"w", b"p", b"q"})


@dataclass(slots=True)
class _Place:
    """The position of reading in one server's log."""

    server: ServerUnderTest
    incarnation: str = ""
    last: str = "0-0"
    operation: str = ""
    written: set[tuple[str, str]] = field(default_factory=set)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Observer:
    """Follows any number of servers, in a task each, from `follow` to `aclose`."""

    def __init__(self, recorder: Recorder, prefix: str) -> None:
        self._recorder = recorder
        self._keys = RegistryKeys(prefix)
        self._places: dict[str, _Place] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def entry_count(self) -> int:
        """Count of the entries written so far."""
        return sum(len(place.written) for place in self._places.values())

    def follow(self, server: ServerUnderTest) -> None:
        """Start to read this server's log."""
        self._places[server.label] = _Place(server)
        self._tasks.append(asyncio.create_task(self._run(server), name=f"observer of {server.label}"))

    async def aclose(self) -> None:
        """Stop reading."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for task in self._tasks:
            if not task.cancelled():
                task.result()  # a task ends by itself only by an error

    async def _run(self, server: ServerUnderTest) -> None:
        while True:
            with contextlib.suppress(StoreError):
                await self.catch_up(server)
            await asyncio.sleep(POLL_S)

    async def catch_up(self, server: ServerUnderTest) -> None:
        """Read all entries that are there now."""
        await self.read_and_run(server)

    async def read_and_run(self, server: ServerUnderTest, *commands: Sequence[Word]) -> None:
        """Read the new entries and run commands that may destroy history, at the same moment. Raises
        StoreError."""
        place, log = self._places[server.label], self._keys.log
        async with place.turn:
            head, at, new, everything, *_ = await server.atomically(
                ("HMGET", self._keys.meta, "inc", "rev"),
                ("XRANGE", log, place.last, place.last),
                ("XRANGE", log, f"({place.last}", "+"),
                # All of the log before commands that may destroy it; nothing otherwise.
                ("XRANGE", log, "-", "+" if commands else "0-1"),
                *commands,
            )
            incarnation = (head[0] or b"").decode()
            unbroken = at and at[0][1][13].decode() == place.operation and incarnation == place.incarnation
            if not unbroken:
                new = everything if commands else await server.execute("XRANGE", log, "-", "+")
            place.incarnation = incarnation
            for entry_id, fields in new:
                record = dict(zip(fields[::2], fields[1::2], strict=True))
                if record.keys() >= _FIELDS:  # a record without these fields is of no release
                    self._write(place, entry_id.decode(), record)

    def _write(self, place: _Place, entry_id: str, fields: dict[bytes, Any]) -> None:
        record = {name.decode(): recorded_value(value) for name, value in fields.items()}
        place.last, place.operation = entry_id, record["w"]
        if record["o"] == "i":
            place.incarnation = record["v"]
        if (entry_id, record["w"]) in place.written:
            return
        place.written.add((entry_id, record["w"]))
        self._recorder.note(
            "log",
            server=place.server.label,
            incarnation=place.incarnation,
            id=entry_id,
            operation=record["w"],
            previous=[record["p"], record["q"]],
            kind=record["o"],
            key=record["k"],
            value=record["v"],
            lease=record["l"],
        )
