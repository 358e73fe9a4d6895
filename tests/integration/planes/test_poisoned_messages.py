"""Messages of other programs and of broken peers, on the nats and redis planes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import nats
import pytest
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg

from dynamo_redis.config import StoreSettings
from dynamo_redis.planes.base import RequestPlaneClient, RequestPlaneServer, Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames.server import MAX_HANDSHAKE_COUNT
from dynamo_redis.planes.tunnel.link import BEHIND_COUNT
from dynamo_redis.planes.tunnel.server import TunnelServer
from dynamo_redis.store.keys import inbox_key
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.wire import tunnel
from dynamo_redis.wire.tunnel import Kind
from tests.broker_plane import Broker, NatsBroker, RedisBroker, ask, serving, target
from tests.tcp_plane import INSTANCE, SECRET, eventually

WAIT_S = 60.0
FLOOD_COUNT = 20_000
NAME = "prober"


class Probe(Protocol):
    """A process that sends what it wants, and reads what comes back."""

    async def send(self, *messages: bytes, connection_id: bytes = b"") -> None: ...
    async def answers(self) -> list[tunnel.Message]: ...


class NatsProbe:
    def __init__(self, client: NatsClient, prefix: str, receiver: str) -> None:
        self._client = client
        self.subject = f"{prefix}.plane.{NAME}"
        self.receiver = receiver
        self._answers: list[tunnel.Message] = []

    async def start(self) -> None:
        await self._client.subscribe(self.subject, cb=self._note)
        await self._client.flush()

    async def _note(self, message: Msg) -> None:
        self._answers.append(tunnel.decode(message.data))

    async def send(self, *messages: bytes, connection_id: bytes = b"") -> None:
        for message in messages:
            await self._client.publish(self.receiver, message, f"{self.subject}.{connection_id.hex() or 0}")
        await self._client.flush()

    async def answers(self) -> list[tunnel.Message]:
        return self._answers


class RedisProbe:
    def __init__(self, redis: RedisClient, prefix: str, receiver: str) -> None:
        self.redis = redis
        self.address = f"default.{NAME}"
        self.receiver = inbox_key(prefix, "requests", receiver)
        self._own = inbox_key(prefix, "replies", self.address)

    async def start(self) -> None:
        await self.redis.execute("XADD", self._own, "MAXLEN", 0, "*", "f", "")
        await self.redis.execute("EXPIRE", self._own, 600)

    async def send(self, *messages: bytes, connection_id: bytes = b"") -> None:
        for first in range(0, len(messages), 1000):
            await self.redis.pipeline(
                ("XADD", self.receiver, "*", "f", self.address, "m", message)
                for message in messages[first : first + 1000]
            )

    async def answers(self) -> list[tunnel.Message]:
        found = []
        for _, fields in await self.redis.execute("XRANGE", self._own, "-", "+"):
            found += [tunnel.decode(v) for n, v in zip(fields[::2], fields[1::2], strict=True) if n == b"m"]
        return found


@asynccontextmanager
async def probing(broker: Broker, receiver: str) -> AsyncIterator[Probe]:
    store = StoreSettings.load()
    if isinstance(broker, NatsBroker):
        client = await nats.connect(broker.url)
        try:
            probe = NatsProbe(client, store.prefix, receiver)
            await probe.start()
            yield probe
        finally:
            await client.close()
    else:
        redis = RedisClient(store.require_url(), timeout_s=WAIT_S)
        try:
            redis_probe = RedisProbe(redis, store.prefix, receiver)
            await redis_probe.start()
            yield redis_probe
        finally:
            await redis.aclose()


@asynccontextmanager
async def serving_throughout(
    broker: Broker, **settings: Any
) -> AsyncIterator[tuple[TunnelServer, RequestPlaneClient, Probe]]:
    """Have a request under way all the time, and at the end some more served over the same connection."""
    async with serving(broker.plane, **{"connect_timeout_s": 30.0, **settings}) as (server, client):
        assert isinstance(server, TunnelServer)
        go_on = asyncio.Event()

        async def wait(_: Any, __: Context) -> AsyncIterator[int]:
            yield 1
            await go_on.wait()
            yield 2

        server.register("wait", wait)
        stream = client.open(target(server, "wait"), None, Context())
        assert await anext(stream) == 1
        async with probing(broker, server.address) as probe:
            yield server, client, probe
        for size_bytes in (10, 2 << 20):
            assert await ask(client, target(server), bytes(size_bytes)) == [bytes(size_bytes)]
        go_on.set()
        assert await anext(stream) == 2
        assert [item async for item in stream] == []


async def eventually_answered(probe: Probe, wanted: set[tuple[Kind, bytes]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not wanted <= {(answer.kind, answer.connection_id) for answer in await probe.answers()}:
            await asyncio.sleep(0.01)


async def until_caught_up(probe: Probe) -> None:
    """Wait until a message is answered. One that comes while much waits to be sent gets no answer."""
    last = an_id()
    async with asyncio.timeout(WAIT_S):
        while last not in {answer.connection_id for answer in await probe.answers()}:
            await probe.send(tunnel.encode_head(Kind.DATA, last, 0))
            await asyncio.sleep(0.05)


def an_id() -> bytes:
    return secrets.token_bytes(tunnel.ID_BYTES)


NO_MESSAGES = {
    "empty": b"",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "cut head": tunnel.encode_head(Kind.DATA, bytes(16), 0)[:-1],
    "unknown kind": bytes([0x7F]) + bytes(24),
    "kind 0": bytes(25),
    "large": b"\xff" * 500_000,
    "json": b'{"jsonrpc": "2.0", "method": "hello", "params": []}',
}


@pytest.mark.parametrize("kind", NO_MESSAGES)
async def test_message_of_no_tunnel_is_counted_and_skipped(
    kind: str, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_throughout(broker) as (server, _, probe):
        await probe.send(*[NO_MESSAGES[kind]] * 3)
        await eventually(lambda: "sent what is no message of this plane" in caplog.text, WAIT_S)
        assert server.connection_count == 1
        assert not await probe.answers()


async def test_other_version_is_answered_with_a_reset(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_throughout(broker) as (server, _, probe):
        ids = {version: an_id() for version in (0, 2, (1 << 64) - 1)}
        for version, connection_id in ids.items():
            await probe.send(tunnel.encode_head(Kind.OPEN, connection_id, version))
        await eventually_answered(probe, {(Kind.RESET, one) for one in ids.values()})
        assert "speaks version 2 of the tunnel" in caplog.text or "speaks version 0" in caplog.text
        assert server.connection_count == 1


async def test_unknown_connection_is_answered_with_a_reset(broker: Broker) -> None:
    async with serving_throughout(broker) as (_, __, probe):
        data, taken, end, reset = (an_id() for _ in range(4))
        await probe.send(
            tunnel.encode_head(Kind.CLOSE, end, 0),
            tunnel.encode_head(Kind.RESET, reset, 0),
            tunnel.encode_head(Kind.DATA, data, 3) + b"content",
            tunnel.encode_head(Kind.TAKEN, taken, 1 << 40),
        )
        await eventually_answered(probe, {(Kind.RESET, data), (Kind.RESET, taken)})
        assert len(await probe.answers()) == 2  # a RESET is never answered with a RESET


CONTENTS = {
    "no msgpack": b"\xc1" * 100,
    "http": b"POST / HTTP/1.1\r\nHost: x\r\n\r\n",
    "too large": b"\x00" * (tunnel.WINDOW_BYTES - tunnel.HEAD_BYTES),
    "nested": b"\x91" * 100_000,
}


@pytest.mark.parametrize("kind", CONTENTS)
async def test_connection_that_carries_no_frames_ends(
    kind: str, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_throughout(broker) as (server, _, probe):
        connection_id = an_id()
        await probe.send(
            tunnel.encode_head(Kind.OPEN, connection_id, tunnel.VERSION),
            tunnel.encode_head(Kind.DATA, connection_id, 0) + CONTENTS[kind],
            connection_id=connection_id,
        )
        await eventually(lambda: caplog.records, WAIT_S)
        await eventually(lambda: server.connection_count == 1, WAIT_S)
        await until_ended(probe, connection_id)


async def until_ended(probe: Probe, connection_id: bytes) -> None:
    async with asyncio.timeout(WAIT_S):
        while not {
            answer.kind for answer in await probe.answers() if answer.connection_id == connection_id
        } & {Kind.RESET, Kind.CLOSE}:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [1, 1 << 63])
async def test_lost_message_ends_its_connection(number: int, broker: Broker) -> None:
    async with serving_throughout(broker) as (server, _, probe):
        connection_id = an_id()
        await probe.send(
            tunnel.encode_head(Kind.OPEN, connection_id, tunnel.VERSION),
            tunnel.encode_head(Kind.DATA, connection_id, number) + b"x",
        )
        await eventually_answered(probe, {(Kind.RESET, connection_id)})
        assert server.connection_count == 1


async def test_content_past_the_window_ends_its_connection(redis_broker: RedisBroker) -> None:
    """NATS itself takes no message as large as that."""
    async with serving_throughout(redis_broker) as (server, _, probe):
        connection_id = an_id()
        await probe.send(
            tunnel.encode_head(Kind.OPEN, connection_id, tunnel.VERSION),
            tunnel.encode_head(Kind.DATA, connection_id, 0) + bytes(8 << 20),
        )
        await eventually_answered(probe, {(Kind.RESET, connection_id)})
        assert server.connection_count == 1


async def test_callers_that_open_and_stay_silent_are_bounded(broker: Broker) -> None:
    async with serving_throughout(broker) as (server, client, probe):
        count = 2 * MAX_HANDSHAKE_COUNT
        await probe.send(*[tunnel.encode_head(Kind.OPEN, an_id(), tunnel.VERSION) for _ in range(count)])
        await until_caught_up(probe)
        assert server.connection_count <= MAX_HANDSHAKE_COUNT + 1
        assert await ask(client, target(server), 1) == [1]


async def test_flood_of_rubbish_costs_neither_requests_nor_memory(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = [*NO_MESSAGES.values()]
    kinds.remove(NO_MESSAGES["large"])
    messages: list[bytes] = []
    for number in range(FLOOD_COUNT // 2):
        messages += kinds[number % len(kinds)], tunnel.encode_head(Kind.DATA, an_id(), number) + b"x" * 100
    async with serving_throughout(broker) as (server, client, probe):
        await probe.send(*messages)
        catching_up = asyncio.create_task(until_caught_up(probe))
        answered = 0
        while not catching_up.done():
            assert await ask(client, target(server), answered) == [answered]
            answered += 1
        await catching_up
        assert server.connection_count == 1
        if isinstance(probe, RedisProbe):
            async with asyncio.timeout(WAIT_S):
                while await probe.redis.execute("XLEN", probe.receiver):
                    await asyncio.sleep(0.01)
    assert len(caplog.records) < 20


@pytest.mark.parametrize(
    "fields",
    [
        ["x", "y"],
        ["f", "default.prober"],
        ["m", tunnel.encode_head(Kind.OPEN, bytes(16), 1)],
        ["m", b"", "f", "default.prober"],
        ["f", b"\xff\xfe", "m", tunnel.encode_head(Kind.OPEN, bytes(16), 1)],
        ["f", "{dynamo}:kv", "m", tunnel.encode_head(Kind.DATA, bytes(16), 1)],
        ["f", "", "m", tunnel.encode_head(Kind.DATA, bytes(16), 1)],
        ["f", "a.*", "m", tunnel.encode_head(Kind.DATA, bytes(16), 1)],
        ["f", "a" * 100_000, "m", tunnel.encode_head(Kind.DATA, bytes(16), 1)],
        ["f", "a", "f", "b", "M", "1", "m", "x", "x", "m"],
    ],
)
async def test_foreign_fields_in_a_stream_are_skipped(
    fields: list[str | bytes], redis_broker: RedisBroker
) -> None:
    async with serving_throughout(redis_broker) as (_, __, probe):
        assert isinstance(probe, RedisProbe)
        before = set(await probe.redis.execute("KEYS", "*"))
        last = an_id()
        await probe.redis.execute("XADD", probe.receiver, "*", *fields)
        await probe.send(tunnel.encode_head(Kind.DATA, last, 1))
        await eventually_answered(probe, {(Kind.RESET, last)})
        assert set(await probe.redis.execute("KEYS", "*")) == before


@pytest.mark.parametrize("reply", ["", "orders.new", "orders.new.00", "dynamo.planes.x.00"])
async def test_foreign_reply_subjects_get_no_message(reply: str, nats_broker: NatsBroker) -> None:
    """A message must not have a worker publish on another program's subjects."""
    async with serving_throughout(nats_broker) as (server, _, probe):
        seen: list[str] = []

        async def note(message: Msg) -> None:
            seen.append(message.subject)

        other = await nats.connect(nats_broker.url)
        try:
            for subject in ("orders.>", "dynamo.planes.>", "orders", "new"):
                await other.subscribe(subject, cb=note)
            await other.flush()
            last = an_id()
            for kind, number in ((Kind.DATA, 1), (Kind.OPEN, 9), (Kind.OPEN, tunnel.VERSION)):
                await other.publish(server.address, tunnel.encode_head(kind, an_id(), number) + b"x", reply)
            await other.flush()
            await probe.send(tunnel.encode_head(Kind.DATA, last, 1))
            await eventually_answered(probe, {(Kind.RESET, last)})
            await other.flush()
            assert seen == []
            assert server.connection_count == 1
        finally:
            await other.close()


async def test_answers_to_a_flood_are_bounded(redis_broker: RedisBroker) -> None:
    """One entry may hold any number of messages, which are all read before the first is answered."""
    async with serving_throughout(redis_broker) as (_, __, probe):
        assert isinstance(probe, RedisProbe)
        messages: list[bytes | str] = []
        for _ in range(FLOOD_COUNT):
            messages += "m", tunnel.encode_head(Kind.DATA, an_id(), 0)
        await probe.redis.execute("XADD", probe.receiver, "*", "f", probe.address, *messages)
        async with asyncio.timeout(WAIT_S):
            while await probe.redis.execute("XLEN", probe.receiver):
                await asyncio.sleep(0.01)
        await until_caught_up(probe)
        assert BEHIND_COUNT <= len(await probe.answers()) <= 2 * BEHIND_COUNT


@pytest.mark.parametrize("number", [(1 << 64) - 1, (1 << 64) - 2])
async def test_stream_whose_ids_are_used_up_is_made_anew(number: int, redis_broker: RedisBroker) -> None:
    """Redis takes no entry behind the largest id, and expiry would never come while the worker lives."""
    async with serving("redis") as (server, client), probing(redis_broker, server.address) as probe:
        assert isinstance(probe, RedisProbe)
        assert await ask(client, target(server), 1) == [1]
        await probe.redis.execute("XADD", probe.receiver, f"{(1 << 64) - 1}-{number}", "x", "y")
        await until_answered(server, client)


async def until_answered(server: RequestPlaneServer, client: RequestPlaneClient) -> None:
    to = Target(INSTANCE, server.address, "echo", SECRET)
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                assert await ask(client, to, "again") == ["again"]
            except Exception:  # noqa: BLE001 - those under way are lost
                await asyncio.sleep(0.05)
            else:
                return
