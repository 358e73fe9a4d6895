"""Random histories on Redis and in memory: the same answers, records and events."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from dynamo_redis.errors import DynamoRedisError, RevisionMismatch
from dynamo_redis.store.base import Compare, DeleteOp, Put, PutOp, Registration, Registry, Revision
from dynamo_redis.store.registry.memory import MemoryRegistry, MemoryServer
from dynamo_redis.store.registry.scripts_api import KeyValue

KEYS = [f"{folder}/{n}" for folder in ("a", "b") for n in range(4)]


class Side:
    """One implementation: two processes, and revisions by the step at which they were made."""

    def __init__(self, processes: list[Registry]) -> None:
        self.processes = processes
        self.registrations: dict[tuple[int, str], Registration] = {}
        self.steps: dict[Revision, int] = {}
        self.by_step: dict[int, Revision] = {}
        self.step = 0

    def named(self, revision: Revision | None) -> object:
        """Return the step that made a revision, so that both sides can be compared."""
        return None if revision is None else self.steps.get(revision, "unknown")

    def made(self, revision: Revision) -> object:
        self.steps.setdefault(revision, self.step)
        self.by_step.setdefault(self.step, revision)
        return self.named(revision)

    async def run(self, action: str, process: int, arguments: dict[str, Any]) -> object:
        self.step += 1
        try:
            return await getattr(self, action)(self.processes[process], process, **arguments)
        except RevisionMismatch as exc:
            return ("mismatch", exc.key, self.named(exc.found))  # type: ignore[arg-type]
        except DynamoRedisError as exc:
            return type(exc).__name__

    async def put(self, registry: Registry, process: int, key: str, value: bytes) -> object:
        return self.made(await registry.put(key, value))

    async def create(self, registry: Registry, process: int, key: str, value: bytes) -> object:
        return self.made(await registry.create(key, value))

    async def validate(self, registry: Registry, process: int, key: str, value: bytes) -> object:
        return self.made(await registry.create_or_validate(key, value))

    async def compare_and_put(
        self, registry: Registry, process: int, key: str, value: bytes, stale: bool
    ) -> object:
        record = await registry.get(key)
        expected = None if record is None or stale else record.mod_revision
        return self.made(await registry.compare_and_put(key, value, expected))

    async def delete(self, registry: Registry, process: int, key: str) -> object:
        return await registry.delete(key)

    async def transact(
        self, registry: Registry, process: int, absent: str, ops: list[PutOp | DeleteOp]
    ) -> object:
        await registry.transact([Compare(absent, None)], ops)
        return "done"

    async def register(
        self, registry: Registry, process: int, key: str, value: bytes, exclusive: bool
    ) -> object:
        self.registrations[process, key] = await registry.register(key, value, exclusive=exclusive)
        return "registered"

    async def update(self, registry: Registry, process: int, key: str, value: bytes) -> object:
        registration = self.registrations.get((process, key))
        if registration is None:
            return "none"
        await registration.update(value)
        return "updated"

    async def unregister(self, registry: Registry, process: int, key: str) -> object:
        registration = self.registrations.pop((process, key), None)
        if registration is not None:
            await registration.unregister()
        return "unregistered"

    async def state(self) -> object:
        snapshot = await self.processes[0].get_prefix("")
        leases = {registry.lease_id: number for number, registry in enumerate(self.processes)}
        return [
            (record.key, record.value, record.version, leases[record.lease] if record.lease else None)
            for record in snapshot.records
        ]


def random_action(rng: random.Random) -> tuple[str, dict[str, Any]]:
    key, value = rng.choice(KEYS), rng.choice([b"x", b"y", b"z" * rng.randrange(300)])
    match rng.randrange(10):
        case 0 | 1:
            return "put", {"key": key, "value": value}
        case 2:
            return "create", {"key": key, "value": value}
        case 3:
            return "validate", {"key": key, "value": value}
        case 4:
            return "compare_and_put", {"key": key, "value": value, "stale": rng.random() < 0.3}
        case 5:
            return "delete", {"key": key}
        case 6:
            ops = [
                PutOp(other, value) if rng.random() < 0.6 else DeleteOp(other)
                for other in rng.sample(KEYS, rng.randrange(4))
            ]
            return "transact", {"absent": key, "ops": ops}
        case 7:
            return "register", {"key": key, "value": value, "exclusive": rng.random() < 0.5}
        case 8:
            return "update", {"key": key, "value": value}
        case _:
            return "unregister", {"key": key}


async def settle(side: Side) -> None:
    """Wait until both processes' readers have read all changes."""
    for process in side.processes:
        await settle_one(side, process)


async def settle_one(side: Side, process: Registry) -> None:
    marker = process.watch("marker")
    await asyncio.wait_for(anext(marker), 30)
    await side.processes[0].put("marker", str(side.step).encode())
    await asyncio.wait_for(anext(marker), 30)
    await marker.aclose()


@pytest.mark.parametrize("seed", range(4))
async def test_redis_and_memory_agree(
    dynamo_redis_url: str, open_registry: Any, mirror: Any, seed: int
) -> None:
    server = MemoryServer()
    twins = [MemoryRegistry(server) for _ in range(2)]
    for twin in twins:
        await twin.start()
    real = Side([await open_registry(dynamo_redis_url, ttl_s=30) for _ in range(2)])
    model = Side([*twins])
    views = [await mirror(side.processes[1], "a/") for side in (real, model)]
    rng = random.Random(seed)
    for step in range(250):
        action, arguments = random_action(rng)
        process = rng.randrange(2)
        answers = [await side.run(action, process, arguments) for side in (real, model)]
        assert answers[0] == answers[1], (seed, step, action, arguments)
        # The log shows losses: let both sides read it before the next step.
        if action in ("put", "delete", "transact", "register", "compare_and_put"):
            await settle(real)
            await settle(model)
        assert await real.state() == await model.state(), (seed, step, action, arguments)
    lost = [
        {key: registration.lost for key, registration in side.registrations.items()} for side in (real, model)
    ]
    assert lost[0] == lost[1]
    seen = [
        [
            (event.record.key, event.record.value, event.record.version)
            if isinstance(event, Put)
            else (event.key, event.cause)
            for batch in view.batches
            for event in batch.events
        ]
        for view in views
    ]
    assert seen[0] == seen[1]
    assert len(seen[0]) > 50
    for twin in twins:
        await twin.aclose()


async def test_a_paged_snapshot_is_one_moment(
    dynamo_redis_url: str, open_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_redis.store.registry.scripts_api.PAGE_KEYS_COUNT", 7)
    monkeypatch.setattr("dynamo_redis.store.registry.scripts_api.PAGE_ENTRIES_COUNT", 5)
    reader, writer = await open_registry(dynamo_redis_url), await open_registry(dynamo_redis_url)
    # Every state of the registry, by its revision, from the log.
    history: dict[Revision, dict[str, bytes]] = {}
    state: dict[str, bytes] = {}

    async def record(watch: Any) -> None:
        first = await anext(watch)  # one moment, for any revisions of its records
        state.update((event.record.key, event.record.value) for event in first.events)
        history[first.revision] = dict(state)
        async for batch in watch:
            assert batch.resync is None
            for event in batch.events:
                if isinstance(event, Put):
                    state[event.record.key] = event.record.value
                    history[event.record.mod_revision] = dict(state)
                else:
                    del state[event.key]
                    history[event.revision] = dict(state)

    for n in range(60):
        await writer.put(f"k/{n:03}", b"0")
    watch = reader.watch("k/")
    recording = asyncio.create_task(record(watch))
    done = asyncio.Event()

    async def write() -> None:
        rng = random.Random(3)
        while not done.is_set():
            key = f"k/{rng.randrange(80):03}"
            if rng.random() < 0.4:
                await writer.delete(key)
            else:
                await writer.put(key, rng.randbytes(4))

    writing = asyncio.create_task(write())
    snapshots = [await reader.get_prefix("k/") for _ in range(25)]
    done.set()
    await writing
    async with asyncio.timeout(30):
        while snapshots[-1].revision not in history:
            await asyncio.sleep(0.01)
    await watch.aclose()
    await recording
    checked = 0
    for snapshot in snapshots:
        expected = history.get(snapshot.revision)
        if expected is not None:
            assert {record.key: record.value for record in snapshot.records} == expected
            checked += 1
    assert checked >= 20
    assert len({snapshot.revision for snapshot in snapshots}) > 10


async def test_snapshots_have_an_order_and_a_bound(dynamo_redis_url: str, open_registry: Any) -> None:
    registry = await open_registry(dynamo_redis_url, timeout_s=3.0)
    for start in range(0, 2500, 500):
        await registry.transact([], [PutOp(f"k/{n:05}", b"v") for n in range(start, start + 500)])
    snapshot = await registry.get_prefix("k/")
    assert [record.key for record in snapshot.records] == [f"k/{n:05}" for n in range(2500)]
    kv: KeyValue = registry._kv
    _, first, last = await kv._pages("k/", {})
    assert first == last
