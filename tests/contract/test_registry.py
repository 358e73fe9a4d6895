"""The contract of registries, in memory and on each installed server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import pytest

from dynamo_redis.errors import (
    Compacted,
    ConfigError,
    KeyExists,
    LeaseNotFound,
    RevisionMismatch,
)
from dynamo_redis.store.base import (
    Compare,
    Delete,
    DeleteCause,
    DeleteOp,
    LostReason,
    Put,
    PutOp,
    Registry,
    Revision,
    Watch,
    WatchBatch,
)
from dynamo_redis.store.keys import TRANSACTION_MAX_COUNT, VALUE_MAX_BYTES

WAIT_S = 30.0


class Deployment(Protocol):
    ttl_s: float

    async def process(self) -> Registry: ...
    async def kill(self, registry: Registry) -> None: ...
    async def wipe(self) -> None: ...
    async def compact(self) -> None: ...


@pytest.fixture
async def registry(deployment: Deployment) -> Registry:
    return await deployment.process()


class Follower:
    """Applies a watch's events to a copy of the prefix, and checks that no event is without cause."""

    def __init__(self, watch: Watch) -> None:
        self.state: dict[str, bytes] = {}
        self.batches: list[WatchBatch] = []
        self.task = asyncio.create_task(self._follow(watch))
        self._watch = watch
        self._news = asyncio.Event()

    async def _follow(self, watch: Watch) -> None:
        async for batch in watch:
            for event in batch.events:
                if isinstance(event, Put):
                    self.state[event.record.key] = event.record.value
                else:
                    assert event.key in self.state, f"phantom {event}"
                    del self.state[event.key]
            self.batches.append(batch)
            self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def until_key(self, key: str) -> None:
        await self.until(lambda: key in self.state)

    async def until_state(self, state: dict[str, bytes]) -> None:
        try:
            await self.until(lambda: self.state == state)
        except TimeoutError:
            assert self.state == state

    @property
    def events(self) -> list[Put | Delete]:
        return [event for batch in self.batches for event in batch.events]

    @property
    def deletes(self) -> dict[str, DeleteCause]:
        return {event.key: event.cause for event in self.events if isinstance(event, Delete)}

    async def aclose(self) -> None:
        await self._watch.aclose()
        await self.task


Follow = Callable[[Registry, str], Awaitable[Follower]]


@pytest.fixture
async def follow() -> AsyncIterator[Follow]:
    followers: list[Follower] = []

    async def begin(registry: Registry, prefix: str) -> Follower:
        follower = Follower(registry.watch(prefix))
        followers.append(follower)
        await follower.until(lambda: bool(follower.batches))
        return follower

    yield begin
    for follower in followers:
        await follower.aclose()


# --------------------------------------------------------------------------- keys and revisions


async def test_a_key_counts_its_versions_and_remembers_its_creation(registry: Registry) -> None:
    first = await registry.put("a/1", b"one")
    second = await registry.put("a/1", b"two")
    record = await registry.get("a/1")
    assert record is not None
    assert (record.value, record.version, record.lease) == (b"two", 2, None)
    assert (record.create_revision, record.mod_revision) == (first, second)
    assert first != second


async def test_a_key_that_comes_back_begins_anew(registry: Registry) -> None:
    await registry.put("a/1", b"one")
    assert await registry.delete("a/1") is True
    assert await registry.get("a/1") is None
    created = await registry.put("a/1", b"two")
    record = await registry.get("a/1")
    assert record is not None
    assert (record.version, record.create_revision) == (1, created)


async def test_delete_returns_whether_the_key_existed(registry: Registry) -> None:
    assert await registry.delete("none") is False
    await registry.put("some", b"")
    assert await registry.delete("some") is True
    assert await registry.delete("some") is False


async def test_values_are_bytes_of_any_kind_and_size(registry: Registry) -> None:
    for value in (b"", b"\0\xff\n", bytes(range(256)) * 1000):
        await registry.put("v", value)
        record = await registry.get("v")
        assert record is not None
        assert record.value == value


async def test_keys_are_text_and_stay_what_they_are(registry: Registry) -> None:
    keys = ["v1/ports/10.0.0.1/80", "ключ/鍵/🔑", "with space", "x" * 1000, "*?[a]\\", "a/%2F/b"]
    for key in keys:
        await registry.put(key, key.encode())
    snapshot = await registry.get_prefix("")
    assert {record.key: record.value.decode() for record in snapshot.records} == {key: key for key in keys}


@pytest.mark.parametrize("key", ["", "a\0b", "\0", "x" * 1025, "\ud800"])
async def test_a_key_that_cannot_be_held_is_refused(registry: Registry, key: str) -> None:
    with pytest.raises(ConfigError, match="registry key"):
        await registry.put(key, b"")
    with pytest.raises(ConfigError, match="registry key"):
        await registry.register(key, b"")


async def test_a_value_too_large_for_the_registry_is_refused(registry: Registry) -> None:
    await registry.put("a/1", bytes(VALUE_MAX_BYTES))
    kept = await registry.register("a/2", b"")
    too_large = bytes(VALUE_MAX_BYTES + 1)
    for attempt in (
        registry.put("a/1", too_large),
        registry.create("a/3", too_large),
        registry.transact([], [DeleteOp("a/1"), PutOp("a/3", too_large)]),
        registry.register("a/3", too_large),
        kept.update(too_large),
    ):
        with pytest.raises(ConfigError, match="object store"):
            await attempt
    assert [record.key for record in (await registry.get_prefix("a/")).records] == ["a/1", "a/2"]


async def test_text_that_is_no_revision_is_refused(registry: Registry) -> None:
    for nonsense in ("", "abc", "1-2-3", "5--3", "1_0-0", " 5-0", "05-0", "٣-0", f"{1 << 64}-0"):
        with pytest.raises(ConfigError, match="not a revision"):
            registry.watch("a/", start_revision=Revision(nonsense))


async def test_a_prefix_is_read_in_order_and_nothing_beside_it(registry: Registry) -> None:
    for key in ("a/2", "a/10", "a/1", "ab", "b/1", "a"):
        await registry.put(key, key.encode())
    snapshot = await registry.get_prefix("a/")
    assert [record.key for record in snapshot.records] == ["a/1", "a/10", "a/2"]
    assert [record.key for record in (await registry.get_prefix("")).records] == [
        "a", "a/1", "a/10", "a/2", "ab", "b/1",
    ]  # fmt: skip
    assert (await registry.get_prefix("none/")).records == ()


async def test_a_snapshot_names_the_revision_it_shows(registry: Registry) -> None:
    await registry.put("a/1", b"")
    last = await registry.put("b/1", b"")
    assert (await registry.get_prefix("a/")).revision == last


# --------------------------------------------------------------------------- conditions


async def test_create_succeeds_once(deployment: Deployment) -> None:
    one, two = await deployment.process(), await deployment.process()
    await one.create("k", b"first")
    with pytest.raises(KeyExists, match="k"):
        await two.create("k", b"second")
    record = await two.get("k")
    assert record is not None
    assert record.value == b"first"


async def test_one_of_many_creators_wins(deployment: Deployment) -> None:
    processes = [await deployment.process() for _ in range(3)]
    creations = [registry.create("k", str(n).encode()) for n, registry in enumerate(processes * 5)]
    results = await asyncio.gather(*creations, return_exceptions=True)
    assert sum(not isinstance(result, BaseException) for result in results) == 1
    assert sum(isinstance(result, KeyExists) for result in results) == 14


async def test_create_or_validate_accepts_the_same_value_only(registry: Registry) -> None:
    revision = await registry.create_or_validate("k", b"config")
    assert await registry.create_or_validate("k", b"config") == revision
    with pytest.raises(KeyExists):
        await registry.create_or_validate("k", b"other")


async def test_compare_and_put_wants_the_present_revision(registry: Registry) -> None:
    with pytest.raises(RevisionMismatch) as absent:
        await registry.compare_and_put("k", b"", Revision("1-1"))
    assert (absent.value.expected, absent.value.found) == ("1-1", None)
    first = await registry.compare_and_put("k", b"1", None)
    second = await registry.compare_and_put("k", b"2", first)
    with pytest.raises(RevisionMismatch) as stale:
        await registry.compare_and_put("k", b"3", first)
    assert (stale.value.key, stale.value.expected, stale.value.found) == ("k", first, second)
    with pytest.raises(RevisionMismatch):
        await registry.compare_and_put("k", b"3", None)


async def test_a_counter_loses_no_increment(deployment: Deployment) -> None:
    processes = [await deployment.process() for _ in range(2)]
    await processes[0].put("n", b"0")

    async def increment(registry: Registry) -> None:
        while True:
            record = await registry.get("n")
            assert record is not None
            try:
                await registry.compare_and_put("n", b"%d" % (int(record.value) + 1), record.mod_revision)
                return
            except RevisionMismatch:
                continue

    await asyncio.gather(*(increment(registry) for registry in processes * 10))
    record = await processes[0].get("n")
    assert record is not None
    assert record.value == b"20"


async def test_a_transaction_happens_whole_or_not_at_all(registry: Registry, follow: Follow) -> None:
    a, b = await registry.put("a", b"1"), await registry.put("b", b"1")
    follower = await follow(registry, "")
    ops: list[PutOp | DeleteOp] = [PutOp("a", b"2"), PutOp("c", b"2"), DeleteOp("b"), DeleteOp("none")]
    with pytest.raises(RevisionMismatch) as failed:
        await registry.transact([Compare("a", a), Compare("b", None), Compare("c", None)], ops)
    assert (failed.value.key, failed.value.found) == ("b", b)
    assert [record.key for record in (await registry.get_prefix("")).records] == ["a", "b"]
    revision = await registry.transact([Compare("a", a), Compare("b", b), Compare("c", None)], ops)
    await follower.until_state({"a": b"2", "c": b"2"})
    assert len(follower.batches) == 2, "a transaction's changes come together"
    assert follower.batches[1].revision == revision
    assert follower.deletes == {"b": DeleteCause.DELETED}


async def test_a_transaction_too_large_for_one_script_is_refused(registry: Registry) -> None:
    await registry.transact([], [PutOp(f"k/{n}", b"") for n in range(TRANSACTION_MAX_COUNT)])
    compares = [Compare("none", None)]
    with pytest.raises(ConfigError, match="split it"):
        await registry.transact(compares, [DeleteOp(f"k/{n}") for n in range(TRANSACTION_MAX_COUNT)])
    large = bytes(VALUE_MAX_BYTES)
    with pytest.raises(ConfigError, match="writes 3,145,728 bytes is too large"):
        await registry.transact([], [PutOp(f"l/{n}", large) for n in range(3)])
    for n in range(3):
        await registry.put(f"l/{n}", large)
    with pytest.raises(ConfigError, match="finds 3,145,"):
        await registry.transact([], [DeleteOp(f"l/{n}") for n in range(3)])
    assert len((await registry.get_prefix("")).records) == TRANSACTION_MAX_COUNT + 3
    await registry.transact([], [PutOp("l/0", large), PutOp("l/1", large)])
    await registry.transact([], [DeleteOp("l/0"), DeleteOp("l/1")])


async def test_transaction_without_effect_returns_present_revision(registry: Registry) -> None:
    revision = await registry.put("a", b"1")
    assert await registry.transact([], [DeleteOp("none")]) == revision
    assert await registry.transact([Compare("none", None)], []) == revision


# --------------------------------------------------------------------------- watch


async def test_a_watch_begins_with_the_state_even_if_there_is_none(registry: Registry) -> None:
    async with registry.watch("a/") as watch:
        batch = await asyncio.wait_for(anext(watch), WAIT_S)
    assert (batch.events, batch.resync) == ((), None)
    await registry.put("a/1", b"1")
    await registry.put("b/1", b"1")
    async with registry.watch("a/") as watch:
        batch = await asyncio.wait_for(anext(watch), WAIT_S)
    assert [event.record.key for event in batch.events if isinstance(event, Put)] == ["a/1"]


async def test_a_watch_sees_every_change_of_its_prefix_in_one_order(
    deployment: Deployment, follow: Follow
) -> None:
    writers = [await deployment.process() for _ in range(2)]
    followers = [await follow(await deployment.process(), "a/") for _ in range(2)]

    async def write(writer: Registry, name: str) -> None:
        for n in range(30):
            await writer.put("a/shared", f"{name}{n}".encode())
            await writer.put(f"b/{name}{n}", b"unseen")
            if n % 10 == 9:
                await writer.delete("a/shared")

    await asyncio.gather(write(writers[0], "x"), write(writers[1], "y"))
    await writers[0].put("a/end", b"")
    for follower in followers:
        await follower.until_key("a/end")
    seen = [
        [event.record.value if isinstance(event, Put) else event.cause for event in follower.events]
        for follower in followers
    ]
    assert seen[0] == seen[1]
    puts = [value for value in seen[0] if isinstance(value, bytes)]
    for name in ("x", "y"):
        assert [value for value in puts if value.startswith(name.encode())] == [
            f"{name}{n}".encode() for n in range(30)
        ]
    assert all(batch.resync is None for follower in followers for batch in follower.batches)


async def test_watches_of_one_process_see_only_their_prefix(registry: Registry, follow: Follow) -> None:
    everything, a, again, b = [await follow(registry, prefix) for prefix in ("", "a/", "a/", "b/")]
    await registry.put("a/1", b"1")
    await registry.put("b/1", b"1")
    await registry.delete("a/1")
    await everything.until(lambda: len(everything.events) == 3)
    await b.until_state({"b/1": b"1"})
    await a.until(lambda: len(a.events) == 2)
    await again.until(lambda: len(again.events) == 2)
    late = await follow(registry, "a/")
    assert late.state == {}


async def test_a_watch_that_ends_ends_its_iteration(registry: Registry) -> None:
    watch = registry.watch("a/")
    await asyncio.wait_for(anext(watch), WAIT_S)
    waiting = asyncio.create_task(watch.__anext__())
    await asyncio.sleep(0)
    await watch.aclose()
    with pytest.raises(StopAsyncIteration):
        await waiting
    await watch.aclose()


async def test_closing_a_registry_ends_its_watches(registry: Registry) -> None:
    watch = registry.watch("a/")
    batches = asyncio.create_task(_all(watch))
    await asyncio.sleep(0.05)
    await registry.aclose()
    assert len(await asyncio.wait_for(batches, WAIT_S)) <= 1


async def _all(watch: Watch) -> list[WatchBatch]:
    return [batch async for batch in watch]


async def test_a_watch_goes_on_from_a_revision(registry: Registry) -> None:
    first = await registry.put("a/1", b"1")
    await registry.put("a/2", b"2")
    await registry.put("b/1", b"unseen")
    await registry.delete("a/1")
    async with registry.watch("a/", start_revision=first) as watch:
        batch = await asyncio.wait_for(anext(watch), WAIT_S)
        assert [event.record.key if isinstance(event, Put) else event.key for event in batch.events] == [
            "a/2",
            "a/1",
        ]
        await registry.put("a/3", b"3")
        batch = await asyncio.wait_for(anext(watch), WAIT_S)
        assert [event.record.key for event in batch.events if isinstance(event, Put)] == ["a/3"]


async def test_a_watch_from_the_revision_just_written_misses_nothing(
    registry: Registry, follow: Follow
) -> None:
    await follow(registry, "a/")  # so that the view exists and may lag
    for n in range(20):
        revision = await registry.put("a/1", b"%d" % n)
        async with registry.watch("a/", start_revision=revision) as watch:
            assert (await asyncio.wait_for(anext(watch), WAIT_S)).events == ()
            await registry.put("a/2", b"%d" % n)
            batch = await asyncio.wait_for(anext(watch), WAIT_S)
            assert [event.record.value for event in batch.events if isinstance(event, Put)] == [b"%d" % n]


async def test_a_forgotten_revision_is_compacted(deployment: Deployment, registry: Registry) -> None:
    first = await registry.put("a/1", b"1")
    await registry.put("a/2", b"2")
    await registry.put("a/3", b"3")
    await deployment.compact()
    for revision in (first, Revision("1-7"), Revision("9999999999999999-0")):
        async with registry.watch("a/", start_revision=revision) as watch:
            with pytest.raises(Compacted, match=revision):
                await asyncio.wait_for(anext(watch), WAIT_S)
            with pytest.raises(StopAsyncIteration):
                await anext(watch)


async def test_a_slow_consumer_gets_the_difference(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_redis.store.registry.watch.QUEUE_EVENTS_COUNT", 10)
    await registry.put("a/gone", b"")
    await registry.put("a/old", b"0")
    await registry.put("a/unchanged", b"0")
    watch = registry.watch("a/")
    await asyncio.wait_for(anext(watch), WAIT_S)
    await registry.put("a/new", b"0")
    await registry.put("a/old", b"1")
    await registry.put("a/unchanged", b"0")
    for n in range(30):
        await registry.put("a/1", b"%d" % n)
    await registry.delete("a/gone")
    marker = registry.watch("z")
    await asyncio.wait_for(anext(marker), WAIT_S)
    await registry.put("z", b"")
    await asyncio.wait_for(anext(marker), WAIT_S)  # by now the reader is past all of it
    batch = await asyncio.wait_for(anext(watch), WAIT_S)
    assert batch.resync is not None
    assert "slow consumer" in batch.resync
    assert [event.key if isinstance(event, Delete) else event.record.value for event in batch.events] == [
        "a/gone", b"29", b"0", b"1",
    ]  # fmt: skip
    assert batch.events[0] == Delete("a/gone", batch.revision, DeleteCause.RESYNC)
    await registry.put("a/2", b"")
    following = await asyncio.wait_for(anext(watch), WAIT_S)
    assert following.resync is None
    await watch.aclose()
    await marker.aclose()


# --------------------------------------------------------------------------- kept keys


async def test_registered_key_has_the_lease_and_ends_with_it(deployment: Deployment, follow: Follow) -> None:
    worker, watcher = await deployment.process(), await deployment.process()
    follower = await follow(watcher, "i/")
    registration = await worker.register("i/1", b"v")
    assert (registration.key, registration.lost) == ("i/1", None)
    record = await watcher.get("i/1")
    assert record is not None
    assert record.lease == worker.lease_id
    await follower.until_state({"i/1": b"v"})
    await worker.aclose()
    await follower.until_state({})
    assert follower.deletes == {"i/1": DeleteCause.REVOKED}


async def test_a_killed_process_goes_after_its_ttl(deployment: Deployment, follow: Follow) -> None:
    worker, watcher = await deployment.process(), await deployment.process()
    follower = await follow(watcher, "i/")
    await worker.register("i/1", b"v")
    await watcher.put("i/free", b"stays")
    await follower.until_state({"i/1": b"v", "i/free": b"stays"})
    loop = asyncio.get_running_loop()
    await deployment.kill(worker)
    killed_at = loop.time()
    await follower.until_state({"i/free": b"stays"})
    assert loop.time() - killed_at < 2 * deployment.ttl_s + 8
    assert follower.deletes == {"i/1": DeleteCause.EXPIRED}
    assert (await watcher.get_prefix("i/")).records[0].key == "i/free"


async def test_a_living_process_keeps_its_keys(deployment: Deployment, follow: Follow) -> None:
    worker, watcher = await deployment.process(), await deployment.process()
    follower = await follow(watcher, "i/")
    await worker.register("i/1", b"v")
    await asyncio.sleep(2.5 * deployment.ttl_s)
    assert follower.state == {"i/1": b"v"}
    assert follower.deletes == {}
    assert worker.lease_losses == 0


async def test_update_and_unregister(deployment: Deployment, follow: Follow) -> None:
    worker, watcher = await deployment.process(), await deployment.process()
    follower = await follow(watcher, "i/")
    registration = await worker.register("i/1", b"1")
    revision = await registration.update(b"2")
    await follower.until_state({"i/1": b"2"})
    record = await watcher.get("i/1")
    assert record is not None
    assert (record.mod_revision, record.version, record.lease) == (revision, 2, worker.lease_id)
    await registration.unregister()
    await registration.unregister()
    await follower.until_state({})
    assert follower.deletes == {"i/1": DeleteCause.DELETED}
    assert registration.lost is None
    with pytest.raises(LeaseNotFound, match="unregistered"):
        await registration.update(b"3")
    await worker.register("i/1", b"again")
    await follower.until_state({"i/1": b"again"})


async def test_a_key_is_registered_once_a_process(registry: Registry) -> None:
    await registry.register("i/1", b"1")
    with pytest.raises(KeyExists):
        await registry.register("i/1", b"2")


async def test_an_exclusive_key_has_one_owner(deployment: Deployment) -> None:
    one, two = await deployment.process(), await deployment.process()
    registration = await one.register("p/80", b"one", exclusive=True)
    with pytest.raises(KeyExists, match="p/80"):
        await two.register("p/80", b"two", exclusive=True)
    await registration.unregister()
    await two.register("p/80", b"two", exclusive=True)
    await one.put("p/81", b"taken")
    with pytest.raises(KeyExists):
        await two.register("p/81", b"two", exclusive=True)


async def test_one_of_many_registrants_of_an_exclusive_key_wins(deployment: Deployment) -> None:
    processes = [await deployment.process() for _ in range(4)]
    results = await asyncio.gather(
        *(registry.register("p/80", b"", exclusive=True) for registry in processes), return_exceptions=True
    )
    assert sum(isinstance(result, KeyExists) for result in results) == 3


async def test_a_port_of_a_killed_process_is_free_after_its_ttl(deployment: Deployment) -> None:
    one, two = await deployment.process(), await deployment.process()
    await one.register("p/80", b"one", exclusive=True)
    await deployment.kill(one)
    refused_count = 0
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await two.register("p/80", b"two", exclusive=True)
                break
            except KeyExists:
                refused_count += 1
                await asyncio.sleep(0.05)
    assert refused_count > 0, "it was the dead one's until its TTL had passed"
    record = await two.get("p/80")
    assert record is not None
    assert (record.value, record.lease) == (b"two", two.lease_id)


async def _told(lost: list[LostReason]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not lost:
            await asyncio.sleep(0.01)


async def test_key_deleted_by_a_caller_is_reported_and_stays_deleted(deployment: Deployment) -> None:
    worker, other = await deployment.process(), await deployment.process()
    lost: list[LostReason] = []
    registration = await worker.register("i/1", b"v", on_lost=lost.append)
    kept = await worker.register("i/2", b"v")
    assert await other.delete("i/1")
    await _told(lost)
    assert lost == [registration.lost] == ["deleted"]
    await asyncio.sleep(deployment.ttl_s)
    assert await other.get("i/1") is None
    assert await other.get("i/2") is not None
    assert kept.lost is None
    with pytest.raises(LeaseNotFound, match="deleted"):
        await registration.update(b"2")
    await registration.unregister()
    assert lost == ["deleted"]


async def test_overwritten_key_is_reported_and_left_to_its_new_owner(deployment: Deployment) -> None:
    worker, other = await deployment.process(), await deployment.process()
    lost: list[LostReason] = []
    registration = await worker.register("i/1", b"v", on_lost=lost.append)
    await other.put("i/1", b"theirs")
    await _told(lost)
    assert lost == ["conflict"]
    await registration.unregister()
    await worker.aclose()
    record = await other.get("i/1")
    assert record is not None
    assert (record.value, record.lease) == (b"theirs", None)


async def test_update_does_not_restore_a_deleted_key(deployment: Deployment) -> None:
    worker, other = await deployment.process(), await deployment.process()
    registration = await worker.register("i/1", b"v")
    await other.delete("i/1")
    with pytest.raises(LeaseNotFound):  # whether or not the log was read yet
        await registration.update(b"2")
    assert await other.get("i/1") is None


async def test_an_on_lost_that_raises_harms_nobody(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    worker, other = await deployment.process(), await deployment.process()
    calls: list[LostReason] = []

    def explode(reason: LostReason) -> None:
        calls.append(reason)
        raise RuntimeError("handler bug")

    await worker.register("i/1", b"v", on_lost=explode)
    await worker.register("i/2", b"v")
    await other.delete("i/1")
    await _told(calls)
    assert "handler bug" in caplog.text
    await asyncio.sleep(1.2 * deployment.ttl_s)
    assert await other.get("i/2") is not None


# --------------------------------------------------------------------------- lost data


async def test_after_a_wipe_everything_registered_comes_back_in_order(
    deployment: Deployment, follow: Follow
) -> None:
    worker, watcher = await deployment.process(), await deployment.process()
    prepared: list[str] = []

    async def prepare() -> None:
        prepared.append("files")

    await worker.register("m/card", b"card", prepare=prepare)
    await worker.register("i/1", b"v")
    await watcher.put("free", b"lost with the data")
    follower = await follow(watcher, "")
    lease = worker.lease_id
    await deployment.wipe()
    await follower.until_state({"m/card": b"card", "i/1": b"v"})
    assert prepared == ["files"]
    resyncs = [batch for batch in follower.batches if batch.resync]
    assert resyncs
    assert "wiped" in (resyncs[0].resync or "")
    assert all(cause is DeleteCause.RESYNC for cause in follower.deletes.values())
    records = {record.key: record for record in (await watcher.get_prefix("")).records}
    assert {record.lease for record in records.values()} == {lease}
    assert _sortable(records["m/card"].create_revision) < _sortable(records["i/1"].create_revision)
    assert worker.lease_losses == 1
    await asyncio.sleep(1.5 * deployment.ttl_s)  # and it is kept alive again
    await follower.until_state({"m/card": b"card", "i/1": b"v"})
    assert worker.lease_losses == 1


def _sortable(revision: Revision) -> tuple[int, ...]:
    return tuple(map(int, revision.split("-")))


async def test_exclusive_key_taken_after_a_wipe_is_lost(deployment: Deployment) -> None:
    one, two = await deployment.process(), await deployment.process()
    lost: list[LostReason] = []
    hold = asyncio.Event()

    async def take_long() -> None:
        await hold.wait()

    await one.register("slow", b"", prepare=take_long)  # is restored before the port
    registration = await one.register("p/80", b"one", exclusive=True, on_lost=lost.append)
    await deployment.wipe()
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await two.register("p/80", b"two", exclusive=True)
                break
            except KeyExists:
                await asyncio.sleep(0.02)
    hold.set()
    await _told(lost)
    assert lost == [registration.lost] == ["conflict"]
    record = await two.get("p/80")
    assert record is not None
    assert record.value == b"two"


async def test_a_prepare_that_fails_is_tried_again(deployment: Deployment, follow: Follow) -> None:
    worker, watcher = await deployment.process(), await deployment.process()
    attempts: list[int] = []

    async def prepare() -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("the disk is away")

    await worker.register("m/card", b"card", prepare=prepare)
    await worker.register("i/1", b"v")
    follower = await follow(watcher, "")
    await deployment.wipe()
    await follower.until(lambda: bool(follower.deletes))
    await follower.until_state({"m/card": b"card", "i/1": b"v"})
    assert len(attempts) == 3


async def test_a_registry_can_be_closed_twice_and_never_started(deployment: Deployment) -> None:
    registry = await deployment.process()
    assert registry.connected
    await registry.aclose()
    await registry.aclose()
