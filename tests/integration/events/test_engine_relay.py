"""The relay of an engine's KV events over real ZeroMQ sockets: it ends with the engine's blocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from dynamo_redis.events.block_hashes import chain, local_hashes
from dynamo_redis.events.engine_zmq import relay as relay_module
from dynamo_redis.events.engine_zmq.relay import EventRelay, RankRelay, rank_endpoint, rank_sources
from dynamo_redis.events.engine_zmq.wire import EventSource
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.wire.kv_event import CLEARED, HOST
from tests.integration.engines.kv_event_server import (
    ALL_CLEARED,
    KvEventServer,
    block_removed,
    block_stored,
    neighbouring_ports,
)

BLOCK_SIZE = 4


def tokens(number: int) -> list[int]:
    """Return the tokens of the block with the engine hash `number`."""
    return [number * 10 + place for place in range(BLOCK_SIZE)]


def names(*numbers: int) -> set[int]:
    """Return the sequence hashes of blocks that each begin a sequence."""
    return {chain(local_hashes(tokens(number), BLOCK_SIZE))[0] for number in numbers}


def root(number: int) -> dict[str, object]:
    return block_stored([number], None, tokens(number))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def server(port: int = 0, replay_port: int | None = 0, **options: int) -> AsyncIterator[KvEventServer]:
    engine = KvEventServer(port=port, replay_port=replay_port, **options)  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        await engine.aclose()


@asynccontextmanager
async def following(
    engine: KvEventServer, *, replay: bool = True, topic: str = "", idle_s: float = 30
) -> AsyncIterator[tuple[RankRelay, KvPublisher]]:
    """Start a relay of that engine's only rank, connected."""
    publisher = KvPublisher(None, block_size=BLOCK_SIZE)
    relay = EventRelay(
        [publisher],
        [EventSource(engine.endpoint, engine.replay_endpoint if replay else None, topic)],
        idle_s=idle_s,
    )
    relay.start()
    try:
        await joined(engine, relay.ranks[0])
        yield relay.ranks[0], publisher
    finally:
        await relay.aclose()


async def joined(engine: KvEventServer, rank: RankRelay) -> None:
    """Publish empty batches until one arrives: a subscription takes effect after a while."""
    before = rank.counts["message"]
    async with asyncio.timeout(20):
        while rank.counts["message"] == before:
            engine.publish([])
            await asyncio.sleep(0.01)


def cleared_count(publisher: KvPublisher) -> int:
    return sum(event.kind == CLEARED for event in publisher.events_from(0) or ())


async def test_engines_events_reach_the_publisher() -> None:
    async with server() as engine, following(engine) as (_, publisher):
        engine.publish([root(1), block_stored([2], 1, tokens(2)), root(3)])
        engine.publish([block_removed([3])])
        expected = set(chain(local_hashes(tokens(1) + tokens(2), BLOCK_SIZE)))
        await until(lambda: set(publisher.blocks()) == expected)
        engine.publish([root(1) | {"medium": "CPU", "token_ids": [], "block_size": 0}, block_removed([2])])
        await until(lambda: set(publisher.blocks(HOST)) == set(publisher.blocks()) == names(1))
        engine.publish([ALL_CLEARED])
        await until(lambda: not publisher.block_count)


async def test_hashes_may_be_bytes_and_topics_are_filtered() -> None:
    block = b"\x07" * 32
    engine = KvEventServer(replay_port=0, topic="kv-events")
    try:
        async with following(engine, topic="kv-events") as (_, publisher):
            engine.publish([block_stored([block], None, tokens(1))])
            await until(lambda: set(publisher.blocks()) == names(1))
            engine.publish([block_removed([block])])
            await until(lambda: not publisher.block_count)
    finally:
        await engine.aclose()


async def test_messages_before_the_relay_are_replayed() -> None:
    async with server() as engine:
        engine.publish([root(1)])
        engine.publish([root(2)])
        async with following(engine) as (_, publisher):
            await until(lambda: set(publisher.blocks()) == names(1, 2))


async def test_late_relay_without_replay_takes_new_messages() -> None:
    async with server(replay_port=None) as engine:
        engine.publish([root(1)])
        async with following(engine) as (_, publisher):
            engine.publish([block_stored([2], 1, tokens(2)), root(3)])
            await until(lambda: set(publisher.blocks()) == names(3))
            assert publisher.left_out["unknown_parent"] == 1


async def test_salted_block_matches_no_prompt() -> None:
    async with server() as engine, following(engine) as (_, publisher):
        publisher.note_prompt([*tokens(1), *tokens(2), *tokens(3), *tokens(4), *tokens(5)])
        salted = block_stored([1], None, tokens(1)) | {"extra_keys": [["salt"]]}
        behind = block_stored([2, 3, 4, 5], 1, [*tokens(2), *tokens(3), *tokens(4), *tokens(5)])
        engine.publish([salted, behind, root(6)])
        await until(lambda: publisher.block_count)
        assert set(publisher.blocks()) == names(6)


async def test_gap_is_filled_by_replay() -> None:
    async with server() as engine, following(engine) as (rank, publisher):
        engine.publish([root(1), root(2)])
        engine.publish([block_removed([1])], lose=True)
        engine.publish([root(3)], lose=True)
        engine.publish([root(4)])
        await until(lambda: set(publisher.blocks()) == names(2, 3, 4))
        assert rank.counts["gap"] == 1
        assert not cleared_count(publisher)


async def test_gap_without_replay_starts_over() -> None:
    async with server() as engine, following(engine, replay=False) as (rank, publisher):
        engine.publish([root(1), root(2)])
        engine.publish([block_removed([1])], lose=True)
        engine.publish([root(4)])
        await until(lambda: set(publisher.blocks()) == names(4))
        assert rank.counts["reset"] == cleared_count(publisher) == 1
        engine.publish([root(5)])
        await until(lambda: set(publisher.blocks()) == names(4, 5))


async def test_gap_that_the_engine_has_forgotten_starts_over() -> None:
    async with server(buffer_count=2) as engine, following(engine) as (rank, publisher):
        engine.publish([root(1)])
        await until(lambda: set(publisher.blocks()) == names(1))
        for number in (2, 3, 4):
            engine.publish([root(number)], lose=True)
        engine.publish([root(5)])
        await until(lambda: set(publisher.blocks()) == names(4, 5))
        assert rank.counts["lost"] == 1
        assert cleared_count(publisher) == 1


async def test_silent_replay_socket_delays_for_a_limited_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with server() as engine, following(engine) as (rank, publisher):
        engine.publish([root(1)])
        await until(lambda: set(publisher.blocks()) == names(1))
        await engine.stop_replays()
        monkeypatch.setattr(relay_module, "REPLAY_S", 0.1)
        engine.publish([root(2)], lose=True)
        engine.publish([root(3)])
        await until(lambda: set(publisher.blocks()) == names(3))
        assert rank.counts["replay_failed"] == 1
        assert rank.counts["lost"] == 1


async def test_dropped_end_of_a_burst_is_replayed_when_idle() -> None:
    async with server() as engine, following(engine, idle_s=0.05) as (_, publisher):
        engine.publish([root(1)])
        engine.publish([root(2)], lose=True)
        await until(lambda: set(publisher.blocks()) == names(1, 2))
        assert not cleared_count(publisher)


@pytest.mark.parametrize("replay", [True, False])
async def test_restarted_engine_is_followed_again(replay: bool) -> None:
    async with server() as engine, following(engine, replay=replay) as (rank, publisher):
        engine.publish([root(1), root(2)])
        for _ in range(2000):  # so that the first message of the next engine has a lower sequence
            engine.publish([])
        await until(lambda: rank.counts["message"] > 2000)
        await engine.aclose()
        async with server(port=engine.port, replay_port=engine.replay_port) as second:
            second.publish([root(3)])
            await joined(second, rank)
            second.publish([root(4)])
            expected = names(3, 4) if replay else names(4)
            await until(lambda: set(publisher.blocks()) == expected)
            assert rank.counts["restart"] == rank.counts["reset"] == 1


async def test_restart_with_a_higher_sequence_is_noticed() -> None:
    """Its next message looks like one after a gap, or like the expected one."""
    async with server() as engine, following(engine) as (rank, publisher):
        engine.publish([root(1)])
        await until(lambda: set(publisher.blocks()) == names(1))
        said_count = engine.next_sequence
        await engine.aclose()
        async with server(port=engine.port, replay_port=engine.replay_port) as second:
            for _ in range(said_count - 1):
                second.publish([])
            second.publish([root(2)])
            second.publish([root(3)])
            await until(lambda: set(publisher.blocks()) == names(2, 3))
            assert rank.counts["restart"] == 1


async def test_reconnected_engine_is_recognized() -> None:
    """A connection that broke loses no block, and messages missed meanwhile are replayed."""
    async with server() as engine, following(engine) as (rank, publisher):
        engine.publish([root(1)])
        await until(lambda: set(publisher.blocks()) == names(1))
        engine.hang_up()
        engine.publish([root(2)], lose=True)
        engine.listen_again()
        await joined(engine, rank)
        await until(lambda: set(publisher.blocks()) == names(1, 2))
        assert not cleared_count(publisher)


async def test_each_rank_is_followed_at_its_own_port() -> None:
    ports = neighbouring_ports()
    async with server(port=ports[0]) as first, server(port=ports[1], dp_rank=1) as second:
        publishers = [KvPublisher(None, block_size=BLOCK_SIZE, dp_rank=rank) for rank in range(2)]
        relay = EventRelay(publishers, rank_sources(2, first.endpoint))
        relay.start()
        try:
            await joined(first, relay.ranks[0])
            await joined(second, relay.ranks[1])
            first.publish([root(1)])
            second.publish([root(2)])
            await until(lambda: [set(publisher.blocks()) for publisher in publishers] == [names(1), names(2)])
        finally:
            await relay.aclose()


async def test_slow_relay_loses_messages_and_recovers() -> None:
    """The engine drops messages at its high-water mark; a drop at the end is found when it is idle."""
    async with server(high_water_mark=1) as engine, following(engine, idle_s=0.05) as (rank, publisher):
        last = 0
        for number in range(3000):
            last = number % 50 + 1
            engine.publish([root(last) if number // 50 % 2 == 0 else block_removed([last])])
        engine.publish([root(77)])
        await until(lambda: set(publisher.blocks()) == names(77))
        assert rank.counts["gap"]
        assert not cleared_count(publisher)


async def test_invalid_message_starts_over() -> None:
    async with server() as engine, following(engine) as (rank, publisher):
        engine.publish([root(1)])
        await until(lambda: publisher.block_count == 1)
        engine.send(b"\xc1 not msgpack")
        engine.publish([{"type": "BlockPainted"}, root(2)])
        await until(lambda: set(publisher.blocks()) == names(2))
        assert rank.counts["malformed"] == 1
        assert rank.counts["unknown_type"] == 1


def test_rank_endpoint_adds_the_rank_to_the_port() -> None:
    assert rank_endpoint("tcp://[::1]:5557", 2) == "tcp://[::1]:5559"
    assert rank_endpoint("ipc:///tmp/x", 0) == "ipc:///tmp/x"
    for endpoint in ("ipc:///tmp/x", "tcp://host", "tcp://host:port"):
        with pytest.raises(ValueError):
            rank_endpoint(endpoint, 1)


async def test_endpoint_must_be_an_address() -> None:
    with pytest.raises(ValueError, match="not an address"):
        EventRelay([KvPublisher(None, block_size=4)], [EventSource("http://host:1")])


async def test_missing_engine_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    relay = EventRelay(
        [KvPublisher(None, block_size=4)],
        [EventSource(f"tcp://127.0.0.1:{neighbouring_ports()[0]}")],
        idle_s=0.02,
    )
    relay.start()
    try:
        await until(lambda: "no engine publishes KV events" in caplog.text)
        await asyncio.sleep(0.1)
        assert caplog.text.count("no engine publishes") == 1
    finally:
        await relay.aclose()


async def test_relay_goes_on_after_bad_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    async with server() as engine, following(engine) as (relay, publisher):
        rubbish: list[object] = [None, [], {}, "x", 1 << 63, {"type": "BlockStored"}, ["BlockStored", {}]]
        hashes: list[object] = [-1, 1.5, None, [], "x"]
        rubbish += [root(1) | {"block_hashes": [value]} for value in hashes]
        rubbish += [root(1) | {"token_ids": [value] * BLOCK_SIZE} for value in (-1, 1 << 63, 1.5, None, "x")]
        rubbish += [root(1) | {"block_size": value} for value in (0, -1, 1 << 62, True, None)]
        for event in rubbish:
            engine.publish([event])
        engine.publish([root(2)])
        await until(lambda: names(2) <= set(publisher.blocks()))

        real, failures = publisher.stored, [RuntimeError("a defect")]

        def stored(*args: object, **kwargs: object) -> None:
            if failures:
                raise failures.pop()
            real(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(publisher, "stored", stored)
        engine.publish([root(3)])
        engine.publish([root(4)])
        await until(lambda: names(4) <= set(publisher.blocks()))
        assert relay.counts["malformed"]
