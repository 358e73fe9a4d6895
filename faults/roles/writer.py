"""Clients that read and write a few keys, all the same ones, as fast as they are allowed to.

Transactions touch only the last keys (`JOINED`), so that the others can be checked one by one.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from dynamo_redis.errors import KeyExists, RevisionMismatch
from dynamo_redis.store.base import Compare, DeleteOp, PutOp, Registry, Revision
from faults.history import Outcome, recorded_value
from faults.roles.base import DATA, Process

CLIENTS_COUNT: Final = 2
SINGLE: Final = tuple(f"{DATA}s{n}" for n in range(4))
JOINED: Final = tuple(f"{DATA}t{n}" for n in range(3))

_ACTIONS: Final = {
    "get": 3,
    "put": 3,
    "create": 2,
    "compare_and_put": 4,
    "delete": 2,
    "transact": 2,
}


async def run(process: Process) -> None:
    """Write until told to rest, then stay."""
    registry = await process.open_registry()
    process.recorder.note("started", role="writer", lease=None)
    try:
        await asyncio.gather(*(_Client(process, registry).run() for _ in range(CLIENTS_COUNT)))
        await asyncio.Event().wait()
    finally:
        await registry.aclose()


class _Client:
    """Sends one request at a time. Remembers the revisions it has seen, to compare with."""

    def __init__(self, process: Process, registry: Registry) -> None:
        self._process = process
        self._registry = registry
        self._seen: dict[str, str | None] = {}

    async def run(self) -> None:
        rng = self._process.rng
        while not self._process.resting.is_set():
            (action,) = rng.choices(list(_ACTIONS), weights=list(_ACTIONS.values()))
            await getattr(self, f"_{action}")(rng.choice((*SINGLE, *JOINED)))
            await self._process.pause()

    async def _get(self, key: str) -> None:
        async def attempt() -> tuple[Outcome, Any]:
            record = await self._registry.get(key)
            if record is None:
                return "ok", {"value": None, "revision": None}
            return "ok", {"value": recorded_value(record.value), "revision": record.mod_revision}

        outcome, answer = await self._process.call("get", attempt, key=key)
        if outcome == "ok":
            self._seen[key] = answer["revision"]

    async def _put(self, key: str) -> None:
        value = self._process.new_value()

        async def attempt() -> tuple[Outcome, Any]:
            return "ok", {"revision": await self._registry.put(key, value.encode())}

        self._note(key, await self._process.call("put", attempt, key=key, value=value))

    async def _create(self, key: str) -> None:
        value = self._process.new_value()

        async def attempt() -> tuple[Outcome, Any]:
            try:
                return "ok", {"revision": await self._registry.create(key, value.encode())}
            except KeyExists:
                return "refused", {"exists": True}

        self._note(key, await self._process.call("create", attempt, key=key, value=value))

    async def _compare_and_put(self, key: str) -> None:
        value, expected = self._process.new_value(), self._expected(key)

        async def attempt() -> tuple[Outcome, Any]:
            try:
                return "ok", {"revision": await self._registry.compare_and_put(key, value.encode(), expected)}
            except RevisionMismatch as exc:
                self._seen[key] = exc.found
                return "refused", {"found": exc.found}

        asked = {"key": key, "value": value, "expected": expected}
        self._note(key, await self._process.call("compare_and_put", attempt, **asked))

    async def _delete(self, key: str) -> None:
        async def attempt() -> tuple[Outcome, Any]:
            return "ok", {"deleted": await self._registry.delete(key)}

        outcome, _ = await self._process.call("delete", attempt, key=key)
        if outcome == "ok":
            self._seen[key] = None

    async def _transact(self, _: str) -> None:
        rng = self._process.rng
        compared = rng.sample(JOINED, rng.randint(0, 2))
        changed = rng.sample(JOINED, rng.randint(1, 2))
        compares = [(key, self._expected(key)) for key in compared]
        puts = [(key, self._process.new_value()) for key in changed[:1]]
        deletes = changed[1:]

        async def attempt() -> tuple[Outcome, Any]:
            try:
                revision = await self._registry.transact(
                    [Compare(key, expected) for key, expected in compares],
                    [
                        *(PutOp(key, value.encode()) for key, value in puts),
                        *(DeleteOp(key) for key in deletes),
                    ],
                )
                return "ok", {"revision": revision}
            except RevisionMismatch as exc:
                self._seen[exc.key] = exc.found
                return "refused", {"key": exc.key, "found": exc.found}

        asked: dict[str, Any] = {"compares": compares, "puts": puts, "deletes": deletes}
        outcome, _ = await self._process.call("transact", attempt, **asked)
        if outcome == "ok":
            for key in changed:
                self._seen.pop(key, None)

    def _expected(self, key: str) -> Revision | None:
        """Return the revision last seen. It is right about half of the time, as intended."""
        seen = self._seen.get(key)
        return None if seen is None else Revision(seen)

    def _note(self, key: str, result: tuple[Outcome, Any]) -> None:
        outcome, answer = result
        if outcome == "ok":
            self._seen[key] = answer["revision"]
