"""The contract of event streams, on each implementation and each kind of server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest

from dynamo_redis.config import EventSettings
from dynamo_redis.errors import StreamLost, StreamTrimmed
from dynamo_redis.store.event_base import (
    BEGINNING,
    GROUP_TTL_S,
    Entry,
    EntryId,
    EventGroup,
    EventStreams,
    EventTail,
    NewEntry,
    StreamInfo,
    StreamName,
    entry_order,
)
from dynamo_redis.store.keys import StreamKeys
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.scripts import Script
from dynamo_redis.store.streams import readers
from dynamo_redis.store.streams.memory import MemoryEventStreams
from dynamo_redis.store.streams.redis_streams import RedisEventStreams
from tests.contract.conftest import CLUSTER, SERVERS

STREAM = StreamName("dynamo", "backend", "kv_events")
ODD = StreamName("a/b", "c}d{ e", "t*?[x]", 3)
WAIT_S = 20.0
CEILING_BYTES = 10_000
SETTINGS = EventSettings(event_stream_events_count=1000, event_stream_size_bytes=CEILING_BYTES)


class Clock:
    """The machine's clock, with an offset that the test sets."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return anyio.current_time() + self.ahead_s

    def wall(self) -> float:
        return 1.8e9 + anyio.current_time() + self.ahead_s


class MemoryPlane:
    """Event streams, and a test's interventions from outside."""

    def __init__(self) -> None:
        self._clock = Clock()
        self.streams: EventStreams = MemoryEventStreams(SETTINGS, clock=self._clock)

    async def silence(self, stream: StreamName, group: str) -> None:
        """Make a group silent for too long."""
        assert isinstance(self.streams, MemoryEventStreams)
        self.streams.stream(stream).groups[group].seen -= 3 * GROUP_TTL_S + 1

    async def wipe(self) -> None:
        assert isinstance(self.streams, MemoryEventStreams)
        self.streams.wipe()

    async def aclose(self) -> None:
        await self.streams.aclose()


class RedisPlane:
    """Event streams on a server."""

    def __init__(self, url: str, prefix: str) -> None:
        self.prefix = prefix
        self.redis = open_client(url, timeout_s=3.0)
        self.streams: EventStreams = RedisEventStreams(open_client(url, timeout_s=3.0), prefix, SETTINGS)

    def keys(self, stream: StreamName = STREAM) -> StreamKeys:
        return StreamKeys(self.prefix, stream)

    async def silence(self, stream: StreamName, group: str) -> None:
        silent_ms = round((3 * GROUP_TTL_S + 1) * 1000)
        await self.redis.execute("ZINCRBY", self.keys(stream).groups, -silent_ms, group)

    async def wipe(self) -> None:
        async for key in self.redis.scan(f"{{{self.prefix}/*"):
            await self.redis.execute("DEL", key)

    async def aclose(self) -> None:
        await self.streams.aclose()
        await self.redis.aclose()


Plane = MemoryPlane | RedisPlane
ServerUrls = Callable[[str], str]


@pytest.fixture(params=["memory", *SERVERS, CLUSTER])
async def plane(
    request: pytest.FixtureRequest, server_urls: ServerUrls, dynamo_redis_prefix: str
) -> AsyncIterator[Plane]:
    """An empty event plane."""
    made: Plane
    if request.param == "memory":
        made = MemoryPlane()
    else:
        made = RedisPlane(server_urls(request.param), dynamo_redis_prefix)
    yield made
    await made.aclose()


@pytest.fixture(params=[*SERVERS, CLUSTER])
async def redis_plane(
    request: pytest.FixtureRequest, server_urls: ServerUrls, dynamo_redis_prefix: str
) -> AsyncIterator[RedisPlane]:
    """Event streams on a server, with a client for changes by hand."""
    made = RedisPlane(server_urls(request.param), dynamo_redis_prefix)
    yield made
    await made.aclose()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let readers without new entries check at once whether their group is gone."""
    monkeypatch.setattr(readers, "CHECK_S", 0.0)


async def append(plane: Plane, *contents: bytes | str, stream: StreamName = STREAM) -> None:
    new = [NewEntry(text.encode() if isinstance(text, str) else text, 1) for text in contents]
    await plane.streams.append(stream, new)


async def reader(plane: Plane, name: str = "router", stream: StreamName = STREAM) -> EventGroup:
    group = plane.streams.group(stream, name)
    await group.create()
    return group


async def take(source: EventGroup | EventTail, count: int) -> list[Entry]:
    """Read until there are `count` entries."""
    taken: list[Entry] = []
    with anyio.fail_after(WAIT_S):
        while len(taken) < count:
            taken += await source.read(count=count - len(taken), block_s=1.0)
    return taken


def contents(entries: list[Entry]) -> list[str]:
    return [entry.content.decode() for entry in entries]


def ids(entries: list[Entry]) -> list[EntryId]:
    return [entry.entry_id for entry in entries]


def order(entry_id: EntryId) -> tuple[int, int]:
    milliseconds, number = entry_id.split("-")
    return int(milliseconds), int(number)


async def info(plane: Plane, stream: StreamName = STREAM) -> StreamInfo:
    found = await plane.streams.info(stream)
    assert found is not None
    return found


# ---------------------------------------------------------------------------- reading


async def test_each_group_reads_everything_in_order(plane: Plane) -> None:
    first, second = await reader(plane, "one"), await reader(plane, "two")
    await append(plane, "a", "b")
    await append(plane, "c")
    for group in (first, second):
        entries = await take(group, 3)
        assert contents(entries) == ["a", "b", "c"]
        assert sorted(ids(entries), key=entry_order) == ids(entries)
        assert await group.read(count=10, block_s=0.0) == []
        await group.aclose()


async def test_a_group_begins_at_the_end(plane: Plane) -> None:
    await append(plane, "before")
    group = plane.streams.group(STREAM, "router")
    assert await group.create() == (await info(plane)).last_entry_id
    await append(plane, "after")
    assert contents(await take(group, 1)) == ["after"]
    assert await group.create() == (await info(plane)).last_entry_id  # anew
    assert await group.read(count=10, block_s=0.0) == []
    await group.aclose()


async def test_a_group_of_no_stream_makes_it(plane: Plane) -> None:
    group = plane.streams.group(ODD, "a router: {1}")
    assert await group.create() == BEGINNING
    await append(plane, "x", stream=ODD)
    assert contents(await take(group, 1)) == ["x"]
    assert [found.name for found in await plane.streams.list()] == [ODD]
    await group.aclose()


async def test_group_seeks_entry_floor_or_end(plane: Plane) -> None:
    group = await reader(plane)
    await append(plane, "a", "b", "c")
    first, second, third = ids(await take(group, 3))
    for position, following in ((first, "bc"), (BEGINNING, "abc"), (third, ""), (second, "c")):
        await group.seek(position)
        assert "".join(contents(await group.read(count=10, block_s=0.0))) == following
    await group.seek(third)
    assert await plane.streams.trim(STREAM, second) == second
    await group.seek(second)
    assert contents(await take(group, 1)) == ["c"]
    await group.aclose()


async def test_a_position_below_the_floor_is_refused(plane: Plane) -> None:
    group = await reader(plane)
    await append(plane, "a", "b", "c")
    first, second, _ = ids(await take(group, 3))
    await group.acknowledge([first, second])
    await group.read(count=1, block_s=0.0)
    await plane.streams.trim(STREAM, second)
    for position in (BEGINNING, first):
        with pytest.raises(StreamTrimmed):
            await group.seek(position)
    await group.aclose()


async def test_a_position_of_another_stream_is_refused(plane: Plane) -> None:
    group = await reader(plane)
    await append(plane, "a")
    (old,) = ids(await take(group, 1))
    await plane.streams.delete(STREAM)
    await append(plane, "b")
    await group.create()
    with pytest.raises(StreamTrimmed):
        await group.seek(EntryId(f"{entry_order(old)[0]}-7"))
    await group.aclose()


async def test_a_waiting_reader_is_woken(plane: Plane) -> None:
    group = await reader(plane)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(append_soon, plane, "now")
        assert contents(await take(group, 1)) == ["now"]
    await group.aclose()


async def append_soon(plane: Plane, content: str) -> None:
    await anyio.sleep(0.05)
    await append(plane, content)


async def test_a_cancelled_read_loses_nothing(plane: Plane) -> None:
    group = await reader(plane)
    read: list[Entry] = []

    async def read_on() -> None:
        while True:
            read.extend(await group.read(count=3, block_s=1.0))

    for number in range(30):
        task = asyncio.create_task(read_on())
        await append(plane, f"{number}a", f"{number}b")
        await asyncio.sleep(0.002 * (number % 3))
        task.cancel()
        await asyncio.wait([task])
    read += await take(group, 60 - len(read))
    assert contents(read) == [f"{number}{letter}" for number in range(30) for letter in "ab"]
    assert len(set(ids(read))) == 60
    await group.aclose()


async def test_a_tail_reads_from_a_position_or_an_age(plane: Plane) -> None:
    await append(plane, "a", "b")
    by_age = plane.streams.tail(STREAM, max_age_s=60.0)
    first, _ = await take(by_age, 2)
    by_position = plane.streams.tail(STREAM, after=first.entry_id)
    assert contents(await take(by_position, 1)) == ["b"]
    await anyio.sleep(0.005)
    from_now = plane.streams.tail(STREAM)
    assert await from_now.read(count=10, block_s=0.0) == []
    await append(plane, "c")
    for tail in (by_age, by_position, from_now):
        assert contents(await take(tail, 1)) == ["c"]
        await tail.aclose()


async def test_the_clock_is_that_of_entries(plane: Plane) -> None:
    before = await plane.streams.time_ms(STREAM)
    tail = plane.streams.tail(STREAM, max_age_s=60.0)
    await plane.streams.append(STREAM, [NewEntry(b"a", 1)])
    [entry] = await take(tail, 1)
    assert before <= entry_order(entry.entry_id)[0] <= await plane.streams.time_ms(STREAM)
    await tail.aclose()


async def test_a_tail_waits_for_a_stream_and_goes_on_behind_a_trim(plane: Plane) -> None:
    tail = plane.streams.tail(STREAM, max_age_s=60.0)
    assert await tail.read(count=10, block_s=0.0) == []
    await append(plane, *(b"x" * 1000 for _ in range(30)))
    entries = await tail.read(count=100, block_s=1.0)
    assert 0 < len(entries) <= 10
    await tail.aclose()


# ---------------------------------------------------------------------------- trimming


async def test_trim_keeps_unacknowledged_entries_of_a_group(plane: Plane) -> None:
    slow, quick = await reader(plane, "slow"), await reader(plane, "quick")
    await append(plane, *"abcdef")
    entries = ids(await take(quick, 6))
    await quick.acknowledge(entries)
    await quick.read(count=1, block_s=0.0)
    assert await plane.streams.trim(STREAM, entries[-1]) == BEGINNING
    assert ids(await take(slow, 4)) == entries[:4]
    await slow.acknowledge(entries[:2])
    await slow.read(count=2, block_s=0.0)
    floor = await plane.streams.trim(STREAM, entries[-1])
    # It is an id before the first entry that stays: not always that of an entry.
    assert order(entries[1]) <= order(floor) < order(entries[2])
    assert (await info(plane)).entry_count == 4
    assert await plane.streams.trim(STREAM, entries[0]) == floor  # nothing comes back
    await slow.aclose()
    assert await plane.streams.trim(STREAM, entries[4]) == entries[4]
    await quick.aclose()


async def test_trim_keeps_entries_after_the_snapshot(plane: Plane) -> None:
    await append(plane, "a", "b", "c")
    tail = plane.streams.tail(STREAM, max_age_s=60.0)
    first, *_ = ids(await take(tail, 3))
    floors = await asyncio.gather(*(plane.streams.trim(STREAM, first) for _ in range(2)))
    assert floors == [first, first]
    assert (await info(plane)).entry_count == 2
    beyond = EntryId("99999999999999-0")
    assert await plane.streams.trim(STREAM, beyond) == (await info(plane)).last_entry_id
    await append(plane, "d")
    assert contents(await take(tail, 1)) == ["d"]
    await tail.aclose()


async def test_every_reader_removes_silent_groups(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHECK_S", 0.0)
    dead, alive = await reader(plane, "dead"), await reader(plane, "alive")
    await plane.silence(STREAM, "dead")
    assert await alive.read(count=1, block_s=0.0) == []
    assert [group.name for group in (await info(plane)).groups] == ["alive"]
    await dead.aclose()
    await alive.aclose()


async def test_a_silent_group_is_removed_and_no_other(plane: Plane) -> None:
    dead, alive = await reader(plane, "dead"), await reader(plane, "alive")
    await append(plane, "a")
    (entry,) = ids(await take(alive, 1))
    await alive.acknowledge([entry])
    await alive.read(count=1, block_s=0.0)
    await plane.silence(STREAM, "dead")
    assert {group.name: group.silent_s > 3 * GROUP_TTL_S for group in (await info(plane)).groups} == {
        "alive": False,
        "dead": True,
    }
    assert await plane.streams.trim(STREAM, entry) == entry
    assert [group.name for group in (await info(plane)).groups] == ["alive"]
    with pytest.raises(StreamLost):
        await dead.read(count=1, block_s=0.0)
    await append(plane, "b")
    assert contents(await take(alive, 1)) == ["b"]
    await dead.create()
    await dead.aclose()
    await alive.aclose()


async def test_a_stream_without_a_use_is_removed(plane: Plane) -> None:
    assert not await plane.streams.keep_if_wanted(STREAM)
    await append(plane, "unread")
    assert not await plane.streams.keep_if_wanted(STREAM)
    assert await plane.streams.info(STREAM) is None
    group = await reader(plane)
    await append(plane, "a")
    assert await plane.streams.keep_if_wanted(STREAM)
    assert contents(await take(group, 1)) == ["a"]
    await plane.silence(STREAM, "router")
    assert not await plane.streams.keep_if_wanted(STREAM)
    with pytest.raises(StreamLost):
        await group.read(count=1, block_s=0.0)
    await group.aclose()


async def test_a_stream_with_a_snapshot_is_kept(plane: Plane) -> None:
    group = await reader(plane)
    await append(plane, "a", "b")
    first, _ = ids(await take(group, 2))
    await plane.streams.trim(STREAM, first)
    await group.aclose()
    assert await plane.streams.keep_if_wanted(STREAM)
    assert (await info(plane)).entry_count == 2
    await plane.streams.delete(STREAM)
    assert not await plane.streams.keep_if_wanted(STREAM)


async def test_a_snapshot_behind_the_floor_keeps_no_stream(plane: Plane) -> None:
    """The ceiling has dropped entries after it, so no reader can continue from there."""
    group = await reader(plane)
    await append(plane, "a")
    (first,) = ids(await take(group, 1))
    await plane.streams.trim(STREAM, first)
    await group.aclose()
    for _ in range(3):
        await plane.streams.append(STREAM, [NewEntry(b"x", 400)])
    assert entry_order((await info(plane)).trim_floor) > entry_order(first)
    assert not await plane.streams.keep_if_wanted(STREAM)
    assert await plane.streams.info(STREAM) is None


async def test_publishers_alone_cannot_fill_the_store(plane: Plane) -> None:
    for number in range(100):
        await append(plane, f"{number:04}" * 250)
        assert (await info(plane)).size_bytes <= CEILING_BYTES
    held = await info(plane)
    assert held.size_bytes > CEILING_BYTES * 3 / 4
    assert held.event_count == held.entry_count
    assert held.trim_floor != BEGINNING
    for _ in range(5):
        await plane.streams.append(STREAM, [NewEntry(b"x", 400)])
        assert (await info(plane)).event_count <= 1000
    await append(plane, b"x" * 2 * CEILING_BYTES)  # the newest stays, however large
    assert (await info(plane)).entry_count == 1


async def test_a_reader_that_was_cut_off_by_the_ceiling_is_told(plane: Plane) -> None:
    asleep, awake = await reader(plane, "asleep"), await reader(plane, "awake")
    for _ in range(12):
        await append(plane, b"x" * 1000)
        assert await awake.read(count=10, block_s=0.0)  # entries that were read may be dropped
    with pytest.raises(StreamTrimmed):
        await asleep.read(count=100, block_s=0.0)
    with pytest.raises(StreamTrimmed):
        await asleep.seek(BEGINNING)
    await asleep.create()
    await append(plane, "on")
    assert contents(await take(asleep, 1)) == ["on"]
    await asleep.aclose()
    await awake.aclose()


async def test_a_stream_may_be_bounded_by_time(plane: Plane) -> None:
    await plane.streams.append(STREAM, [NewEntry(b"old", 1)], max_age_s=0.05)
    await anyio.sleep(0.06)
    await plane.streams.append(STREAM, [NewEntry(b"new", 1)], max_age_s=0.05)
    held = await info(plane)
    assert held.entry_count == held.event_count == 1
    assert held.trim_floor != BEGINNING


async def test_age_is_not_looked_at_with_each_entry(
    redis_plane: RedisPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = redis_plane.streams._client  # type: ignore[attr-defined]
    script, run = client.script, []

    async def counted(called: Script, *arguments: object) -> object:
        run.append(called.name)
        return await script(called, *arguments)

    monkeypatch.setattr(client, "script", counted)
    for _ in range(5):
        await redis_plane.streams.append(STREAM, [NewEntry(b"x", 1)], max_age_s=3600.0)
    assert run == ["stream_open", "stream_bound"]
    for key in redis_plane.keys().all[:2]:
        assert await redis_plane.redis.execute("PTTL", key) > 0


# ---------------------------------------------------------------------------- loss


async def test_a_deleted_stream_is_lost_to_its_readers(plane: Plane) -> None:
    group = await reader(plane)
    await append(plane, "a")
    (entry,) = ids(await take(group, 1))
    assert await plane.streams.delete(STREAM)
    assert not await plane.streams.delete(STREAM)
    assert await plane.streams.info(STREAM) is None
    with pytest.raises(StreamLost):
        await group.read(count=1, block_s=0.0)
    with pytest.raises(StreamLost):
        await group.seek(entry)
    await append(plane, "b")
    with pytest.raises(StreamLost):
        await group.read(count=1, block_s=0.0)
    await group.create()
    await append(plane, "c")
    assert contents(await take(group, 1)) == ["c"]
    await group.aclose()


async def test_waiting_reader_gets_an_error_after_a_wipe(plane: Plane) -> None:
    group = await reader(plane)
    await append(plane, "a")
    await take(group, 1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wipe_soon, plane)
        await is_lost(group)
    await group.aclose()


async def is_lost(group: EventGroup) -> None:
    with anyio.fail_after(WAIT_S), suppress(StreamLost):
        while True:
            await group.read(count=1, block_s=0.5)


async def wipe_soon(plane: Plane) -> None:
    await anyio.sleep(0.05)
    await plane.wipe()


async def test_streams_are_listed_with_their_groups(plane: Plane) -> None:
    assert await plane.streams.list() == []
    group = await reader(plane, stream=ODD)
    await plane.streams.append(ODD, [NewEntry(b"abc", 3), NewEntry(b"de", 2), NewEntry(b"f", 1)])
    await append(plane, "x")
    first, second = ids(await take(group, 2))
    await group.acknowledge([first])
    await group.read(count=1, block_s=0.0)
    odd, plain = sorted(await plane.streams.list(), key=lambda found: found.name.shard, reverse=True)
    assert (odd.name, plain.name) == (ODD, STREAM)
    assert (odd.entry_count, odd.event_count, odd.size_bytes) == (3, 6, 6)
    assert entry_order(odd.last_entry_id) > entry_order(second)
    (told,) = odd.groups
    assert told.name == "router"
    assert told.lag_count in (2, 3)  # servers before 7.0 count only an upper bound
    assert entry_order(first) <= entry_order(told.position) < entry_order(second)
    assert 0.0 <= told.silent_s < WAIT_S
    await group.aclose()
    assert (await info(plane, ODD)).groups == ()


# ---------------------------------------------------------------------------- topics


async def test_topic_reaches_its_subscribers(plane: Plane) -> None:
    assert await plane.streams.publish(ODD, b"without a subscriber") == 0
    one, two = await plane.streams.subscribe(ODD), await plane.streams.subscribe(ODD)
    other = await plane.streams.subscribe(STREAM)
    for number in range(100):
        assert await plane.streams.publish(ODD, b"%d" % number) == 2
    for subscription in (one, two):
        assert [await subscription.next(WAIT_S) for _ in range(100)] == [b"%d" % n for n in range(100)]
    assert await other.next(0.01) is None
    for subscription in (one, two, other):
        await subscription.aclose()
    await plane.streams.publish(ODD, b"without a subscriber")


# ---------------------------------------------------------------------------- by hand, on servers


async def test_a_group_destroyed_by_hand_is_lost(redis_plane: RedisPlane) -> None:
    group = await reader(redis_plane)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(destroy_soon, redis_plane, "router")
        await is_lost(group)
    await group.aclose()


async def destroy_soon(plane: RedisPlane, group: str) -> None:
    await anyio.sleep(0.05)
    await plane.redis.execute("XGROUP", "DESTROY", plane.keys().events, group)


@pytest.mark.parametrize("deletion", ["XDEL", "XTRIM"])
async def test_entries_deleted_by_hand_are_noticed_by_every_reader(
    redis_plane: RedisPlane, impatient: None, deletion: str
) -> None:
    groups = [await reader(redis_plane, name) for name in ("one", "two")]
    await append(redis_plane, "a", "b", "c", "d")
    _, second, _, _ = ids(await take(groups[0], 4))
    await take(groups[1], 1)
    which = ("XDEL", second) if deletion == "XDEL" else ("XTRIM", "MAXLEN", "1")
    await redis_plane.redis.execute(which[0], redis_plane.keys().events, *which[1:])
    for group in groups:
        with pytest.raises(StreamTrimmed):
            await read_to_the_end(group)
    with pytest.raises(StreamTrimmed):
        await groups[0].seek(second)
    held = await info(redis_plane)
    assert held.entry_count == held.event_count == (1 if deletion == "XTRIM" else 3)
    for group in groups:
        await group.create()
    await append(redis_plane, "e")
    for group in groups:
        assert contents(await take(group, 1)) == ["e"]
        await group.aclose()


async def read_to_the_end(group: EventGroup) -> None:
    while await group.read(count=1, block_s=0.0):
        pass


async def test_a_trim_by_hand_of_all_that_was_unread_is_noticed(
    redis_plane: RedisPlane, impatient: None
) -> None:
    group = await reader(redis_plane)
    await append(redis_plane, "a", "b")
    await take(group, 1)
    assert await group.read(count=1, block_s=0.0)
    assert await group.read(count=1, block_s=0.0) == []
    await append(redis_plane, "c")
    await redis_plane.redis.execute("XTRIM", redis_plane.keys().events, "MAXLEN", "0")
    with pytest.raises(StreamTrimmed):
        await group.read(count=1, block_s=0.0)
    await group.aclose()


async def test_entries_gone_while_their_answer_was_lost_are_noticed(redis_plane: RedisPlane) -> None:
    group = await reader(redis_plane)
    await append(redis_plane, "a", "b")
    raw: Any = group
    raw._unanswered = True
    consumer = ("XREADGROUP", "GROUP", "router", readers._CONSUMER, "COUNT", 10)
    await redis_plane.redis.execute(*consumer, "STREAMS", redis_plane.keys().events, ">")
    assert contents(await take(group, 1)) == ["a"]
    await redis_plane.redis.execute("XTRIM", redis_plane.keys().events, "MAXLEN", "0")
    raw._unanswered = True
    with pytest.raises(StreamTrimmed):
        await group.read(count=10, block_s=0.0)
    await group.aclose()


async def test_entry_of_another_program_is_read_as_empty(redis_plane: RedisPlane) -> None:
    group = await reader(redis_plane)
    await append(redis_plane, "a")
    foreign: list[Any] = ["XADD", redis_plane.keys().events, "*", "what", "ever"]
    await redis_plane.redis.execute(*foreign)
    await append(redis_plane, "b")
    entries = await take(group, 3)
    assert contents(entries) == ["a", "", "b"]
    held = await info(redis_plane)
    assert (held.entry_count, held.size_bytes) == (3, 2)
    with pytest.raises(StreamTrimmed):  # entries changed by hand are not trusted
        await group.read(count=1, block_s=0.0)
    await group.create()
    await group.aclose()
    assert await redis_plane.streams.trim(STREAM, EntryId("99999999999999-0")) == entries[-1].entry_id
    assert (await info(redis_plane)).event_count == 0


@pytest.mark.parametrize("lost", ["meta", "sizes"])
async def test_a_lost_head_is_made_of_the_entries(
    redis_plane: RedisPlane, impatient: None, lost: str
) -> None:
    group = await reader(redis_plane)
    await append(redis_plane, "a", "b", "c")
    first, second, _ = ids(await take(group, 3))
    await group.acknowledge([first])
    await group.read(count=1, block_s=0.0)
    assert await redis_plane.streams.trim(STREAM, first) == first
    await redis_plane.redis.execute("DEL", f"{redis_plane.keys().tag}:{lost}")
    await append(redis_plane, "d")
    with pytest.raises(StreamTrimmed):
        await read_to_the_end(group)
    held = await info(redis_plane)
    assert (held.entry_count, held.event_count, held.size_bytes) == (3, 3, 3)
    assert held.trim_floor != BEGINNING
    with pytest.raises(StreamTrimmed):
        await group.seek(BEGINNING)
    await group.seek(second)
    assert contents(await take(group, 2)) == ["c", "d"]
    await group.aclose()


async def test_a_stream_whose_entries_were_deleted_is_lost(redis_plane: RedisPlane) -> None:
    group = await reader(redis_plane)
    await append(redis_plane, "a", "b", "c")
    first, second, _ = ids(await take(group, 3))
    await group.acknowledge([first])
    await group.read(count=1, block_s=0.0)
    await redis_plane.streams.trim(STREAM, first)
    await redis_plane.redis.execute("DEL", redis_plane.keys().events)
    assert await redis_plane.streams.info(STREAM) is None
    with pytest.raises(StreamLost):
        await group.read(count=1, block_s=0.0)
    assert await group.create() == BEGINNING
    await append(redis_plane, "d")
    for position in (first, second):
        with pytest.raises(StreamTrimmed):
            await group.seek(position)
    held = await info(redis_plane)
    assert (held.entry_count, held.event_count) == (1, 1)
    await group.seek(BEGINNING)
    assert contents(await take(group, 1)) == ["d"]
    await group.aclose()


@pytest.fixture
async def most_changed(redis_plane: RedisPlane, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of entries or sizes that each call of a stream's script has dropped or made."""
    changed: list[int] = []
    keys, client = redis_plane.keys(), redis_plane.streams._client  # type: ignore[attr-defined]
    script = client.script

    async def count() -> tuple[int, int]:
        return await redis_plane.redis.execute("XLEN", keys.events), await redis_plane.redis.execute(
            "LLEN", keys.sizes
        )

    async def counted(*arguments: object) -> object:
        before = await count()
        answer = await script(*arguments)
        changed.extend(abs(now - then) for now, then in zip(await count(), before, strict=True))
        return answer

    monkeypatch.setattr(client, "script", counted)
    return changed


async def fill_long(plane: RedisPlane, count: int) -> EntryId:
    for start in range(0, count, 3000):
        await append(plane, *["x"] * min(3000, count - start))
    last, _ = (await plane.redis.execute("XREVRANGE", plane.keys().events, "+", "-", "COUNT", 1))[0]
    return EntryId(last.decode())


async def test_a_long_stream_is_trimmed_in_bounded_calls(
    redis_plane: RedisPlane, most_changed: list[int]
) -> None:
    redis_plane.streams._settings = EventSettings.load()  # type: ignore[attr-defined]
    last = await fill_long(redis_plane, 15_000)
    assert await redis_plane.streams.trim(STREAM, last) == last
    held = await info(redis_plane)
    assert (held.entry_count, held.event_count, held.size_bytes) == (0, 0, 0)
    assert 0 < max(most_changed) < 5000


async def test_a_long_stream_is_mended_in_bounded_calls(
    redis_plane: RedisPlane, most_changed: list[int]
) -> None:
    redis_plane.streams._settings = EventSettings.load()  # type: ignore[attr-defined]
    await fill_long(redis_plane, 15_000)
    for lost in ("sizes", "meta"):
        await redis_plane.redis.execute("DEL", f"{redis_plane.keys().tag}:{lost}")
        held = await info(redis_plane)
        assert (held.entry_count, held.event_count, held.size_bytes) == (15_000, 15_000, 15_000)
        assert await redis_plane.redis.execute("HGET", redis_plane.keys().meta, "breaks") == b"1"
        assert await redis_plane.redis.execute("LLEN", redis_plane.keys().sizes) == 15_000
    assert 0 < max(most_changed) < 5000


async def test_a_stream_far_over_its_ceiling_is_cut_in_bounded_calls(
    redis_plane: RedisPlane, most_changed: list[int]
) -> None:
    redis_plane.streams._settings = EventSettings.load()  # type: ignore[attr-defined]
    await fill_long(redis_plane, 15_000)
    redis_plane.streams._settings = SETTINGS  # type: ignore[attr-defined]
    await append(redis_plane, "last")
    held = await info(redis_plane)
    assert held.event_count <= SETTINGS.event_stream_events_count
    assert held.entry_count == held.event_count >= 1
    assert 0 < max(most_changed) < 5000


async def test_a_full_server_still_trims_and_hears_signs_of_life(
    redis_plane: RedisPlane, impatient: None
) -> None:
    group = await reader(redis_plane)
    await append(redis_plane, "a")
    (entry,) = ids(await take(group, 1))
    await redis_plane.redis.execute("CONFIG", "SET", "maxmemory", "1")
    try:
        await group.acknowledge([entry])
        assert await group.read(count=1, block_s=0.0) == []
        assert await redis_plane.streams.trim(STREAM, entry) == entry
    finally:
        await redis_plane.redis.execute("CONFIG", "SET", "maxmemory", "0")
    await group.aclose()
