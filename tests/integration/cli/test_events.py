"""The commands for event streams, against a real server."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import anyio
import pytest
import redis

from dynamo_redis.config import EventSettings
from dynamo_redis.names import format_instance_id
from dynamo_redis.store.event_base import EventStreams, NewEntry, StreamName
from dynamo_redis.store.keys import StreamKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.streams.readers import RedisEventGroup
from dynamo_redis.store.streams.redis_streams import RedisEventStreams
from dynamo_redis.wire.event import EventBatch, PublisherId
from dynamo_redis.wire.kv_event import DISK, cleared, removed, stored
from tests.integration.conftest import Cli

KV = StreamName("dynamo", "backend", "kv_events")
SYNC = StreamName("dynamo", "odd/name", "prefill_events", 2)
PUBLISHER = PublisherId(0x1234, 99, 1)

Act = Callable[[Callable[[EventStreams], Awaitable[None]]], None]


@pytest.fixture
def act(dynamo_redis_url: str, dynamo_redis_prefix: str) -> Act:
    """Run a function on the streams of the commands."""

    async def main(action: Callable[[EventStreams], Awaitable[None]]) -> None:
        client = RedisClient(dynamo_redis_url, timeout_s=3.0)
        async with RedisEventStreams(client, dynamo_redis_prefix, EventSettings()) as streams:
            await action(streams)

    return lambda action: anyio.run(main, action)


def batch(first_sequence: int, *events: object) -> NewEntry:
    made = EventBatch("kv_events", PUBLISHER, first_sequence, 1_800_000_000_000, list(events))
    return NewEntry(made.to_bytes(), len(events))


async def fill(streams: EventStreams) -> None:
    """Add events, and the group of a killed router, which stays."""
    group = streams.group(KV, "router-1")
    assert isinstance(group, RedisEventGroup)
    await group.create()
    events = [stored([1, 2, 3, 4, 5]), removed([5], DISK), cleared()]
    await streams.append(KV, [batch(0, *(event.to_wire() for event in events))])
    await streams.append(KV, [batch(3, ["unheard", {"of": b"\xff"}]), batch(4), NewEntry(b"garbage", 1)])
    (first,) = await group.read(count=1, block_s=1.0)
    await group.acknowledge([first.entry_id])
    await group.read(count=1, block_s=0.0)
    await group._connection.aclose()


def test_streams_are_listed_with_their_lag(cli: Cli, act: Act) -> None:
    nothing = cli("events", "ls")
    assert (nothing.code, nothing.out, nothing.err) == (0, "", "no event streams\n")
    act(fill)
    act(lambda streams: streams.append(SYNC, [NewEntry(b"x", 1)]))
    kv, sync = cli("events", "ls", "--json").json
    assert (kv["stream"], kv["entry_count"], kv["event_count"]) == ("dynamo/backend/kv_events", 4, 5)
    assert sync["stream"] == "dynamo/odd%2Fname/prefill_events/2"
    (group,) = cli("events", "lag", "dynamo/backend/kv_events", "--json").json
    assert (group["group"], group["lag_count"]) == ("router-1", 3)
    table = cli("events", "ls").out
    assert "dynamo/backend/kv_events" in table
    assert table.splitlines()[-1].split()[-1] == "0"  # the other stream has no reader
    assert "router-1" in cli("events", "lag").out
    assert cli("events", "lag", str(sync["stream"])).err == "no router reads event streams\n"


def test_unreadable_streams_end_their_lists_with_1(
    cli: Cli, act: Act, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    act(fill)
    act(lambda streams: streams.append(SYNC, [NewEntry(b"x", 1)]))
    with redis.Redis.from_url(dynamo_redis_url) as admin:
        admin.hset(StreamKeys(dynamo_redis_prefix, SYNC).meta, "v", "99")
    for command in (("events", "ls"), ("events", "lag")):
        shown = cli(*command)
        assert (shown.code, shown.err) == (1, "dynamo-redis: 1 event stream cannot be read: see above\n")
        assert "dynamo/backend/kv_events" in shown.out
        assert "99" in shown.out.splitlines()[-1]
        assert [list(row) for row in json.loads(cli(*command, "--json").out)][-1] == ["error"]


def test_events_are_shown_decoded(cli: Cli, act: Act) -> None:
    act(fill)
    shown = cli("events", "tail", "--since", "1h", "--count", "6", "--json")
    assert shown.code == 0, shown.err
    lines = [json.loads(line) for line in shown.out.splitlines()]
    hashes = [f"{n:016x}" for n in (1, 2, 3, 4, 5)]
    assert [line.get("event") for line in lines] == [
        {"kind": "stored", "tier": "device", "hashes": hashes},
        {"kind": "removed", "tier": "disk", "hashes": hashes[-1:]},
        {"kind": "cleared", "tier": "device", "hashes": []},
        ["unheard", {"of": "base64:/w=="}],
        None,
        None,
    ]
    assert [line.get("sequence") for line in lines] == [0, 1, 2, 3, 4, None]
    assert lines[0]["instance_id"] == format_instance_id(0x1234)
    assert "unreadable" in lines[5]["error"]
    text = cli("events", "tail", "dynamo/backend/kv_events", "--since", "1h", "--count", "6").out.splitlines()
    assert "stored device" in text[0]
    assert "1 more" in text[0]
    assert "unreadable" in text[5]


def test_a_stream_is_removed(cli: Cli, act: Act) -> None:
    act(fill)
    assert cli("events", "rm", "dynamo/backend/kv_events", "--json").json[0]["removed"]
    assert cli("events", "ls", "--json").json == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tail",), "no event streams yet"),
        (("tail", "dynamo/backend"), "NAMESPACE/COMPONENT/TOPIC"),
        (("tail", "a/b/c/d"), "NAMESPACE/COMPONENT/TOPIC"),
        (("tail", "--since", "yesterday"), "is not a duration"),
        (("lag", "a/b/c"), "no such event stream: a/b/c (`dynamo-redis events ls` lists them)"),
        (("rm", "a/b/c/7"), "no such event stream: a/b/c/7"),
    ],
)
def test_errors_say_what_to_do(cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    done = cli("events", *arguments)
    assert done.code != 0
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_tail_needs_a_name_if_there_are_several(cli: Cli, act: Act) -> None:
    for name in (KV, SYNC):
        act(lambda streams, name=name: streams.append(name, [NewEntry(b"x", 1)]))  # type: ignore[misc]
    done = cli("events", "tail")
    assert "give one of dynamo/backend/kv_events, dynamo/odd%2Fname/prefill_events/2" in done.err
