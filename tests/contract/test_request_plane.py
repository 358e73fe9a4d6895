"""The contract of a request plane. Parametrized over the planes; no test here depends on one."""

from __future__ import annotations

import asyncio
import copy
import logging
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import msgpack
import pytest

from dynamo_redis.config import PlaneSettings, env_name
from dynamo_redis.errors import (
    AuthenticationFailed,
    CannotConnect,
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    EndpointNotFound,
    HandlerFailed,
    InstanceRemoved,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    PlaneError,
    RequestCancelled,
)
from dynamo_redis.planes.base import Handler, RequestPlaneClient, RequestPlaneServer, ResponseStream, Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.select import make_client, make_server
from tests.certificates import Authority
from tests.nats_server import NatsServer, find_nats_server

PLANES = ("tcp", "tcp over TLS", "http", "http over TLS", "nats", "redis")
SECRET = b"a secret of the instance, random"
INSTANCE = 0x694D98147D54BFDE
MIB = 1 << 20
HTTP_UNREAD_BYTES = 16 * MIB
"""Most bytes of one answer in the windows of HTTP/2 and the buffers of its server."""


@dataclass
class Deployment:
    """A server, a client, and handlers."""

    server: RequestPlaneServer
    client: RequestPlaneClient
    settings: PlaneSettings

    def target(self, subject: str, **changes: Any) -> Target:
        return Target(
            **{
                "instance_id": INSTANCE,
                "address": self.server.address,
                "subject": subject,
                "secret": SECRET,
                **changes,
            }
        )

    def most_unread_count(self, size_bytes: int) -> int:
        """Return the most items of a size that are under way and unread.

        Where a proxy may stand between, the bytes of HTTP are bounded, and not the items.
        """
        count = 2 * self.settings.channel_buffer_count if size_bytes < MIB else 0
        return count + (HTTP_UNREAD_BYTES // size_bytes if self.server.plane == "http" else 0)

    def serve(self, handler: Handler, subject: str = "test", **options: Any) -> Target:
        self.server.register(subject, handler, **options)
        return self.target(subject)

    def open(
        self, target: Target, request: Any = None, context: Context | None = None, **options: Any
    ) -> ResponseStream:
        return self.client.open(target, request, context or Context(), **options)

    async def ask(
        self, target: Target, request: Any = None, context: Context | None = None, **options: Any
    ) -> list[Any]:
        return [item async for item in self.open(target, request, context, **options)]


@asynccontextmanager
async def deployment(plane: str, **overrides: Any) -> AsyncIterator[Deployment]:
    settings = PlaneSettings.load(request_plane=plane, **overrides)
    server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
    await server.start()
    client = make_client(settings)
    try:
        yield Deployment(server, client, settings)
    finally:
        await client.aclose()
        await server.aclose()


@pytest.fixture(scope="module")
def tls_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The settings with which both sides show each other a certificate."""
    authority = Authority(tmp_path_factory.mktemp("tls"))
    settings = authority.settings(authority.issue(), "mutual")
    return {env_name(PlaneSettings.model_fields[name]): str(value) for name, value in settings.items()}


@pytest.fixture(scope="module")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if find_nats_server() is None:
        pytest.skip("no nats-server on this machine; on Debian and Ubuntu: apt-get install nats-server")
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


@pytest.fixture(params=PLANES)
def plane(
    request: pytest.FixtureRequest, tls_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> str:
    name = str(request.param).removesuffix(" over TLS")
    if name == "http":
        monkeypatch.setenv("DYN_HTTP_RPC_PORT", "0")
    if name == "nats":
        monkeypatch.setenv("NATS_SERVER", request.getfixturevalue("nats_url"))
    if name == "redis":
        monkeypatch.setenv("DYN_REDIS_URL", request.getfixturevalue("dynamo_redis_url"))
        monkeypatch.setenv("DYN_REDIS_PREFIX", request.getfixturevalue("dynamo_redis_prefix"))
    if name != request.param:
        for env, value in tls_environment.items():
            monkeypatch.setenv(env, value)
        assert PlaneSettings.load().tcp_tls == "mutual"
    return name


@pytest.fixture
async def deployed(plane: str) -> AsyncIterator[Deployment]:
    async with deployment(plane) as made:
        yield made


async def eventually(condition: Callable[[], bool], within_s: float = 3.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.005)


def depth_of(value: Any) -> int:
    depth = 0
    while isinstance(value, list):
        depth, value = depth + 1, value[0]
    return depth


async def echo(request: Any, _: Context) -> Any:
    return request


async def count_to(request: int, _: Context) -> AsyncIterator[int]:
    for number in range(request):
        yield number


# --------------------------------------------------------------------------- answers


async def test_one_request_one_answer(deployed: Deployment) -> None:
    target = deployed.serve(echo)
    assert await deployed.ask(target, {"token_ids": [1, 2, 3], "text": "héllo 🙂"}) == [
        {"token_ids": [1, 2, 3], "text": "héllo 🙂"}
    ]


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1, 2**64 - 1, -(2**63), 1.5, "", "é" * 70_000, b"", b"\xff", [], {}, {1: [None]}],
)
async def test_msgpack_values_arrive_unchanged(deployed: Deployment, value: Any) -> None:
    [answer] = await deployed.ask(deployed.serve(echo), value)
    assert answer == value
    assert type(answer) is type(value)


async def test_items_arrive_in_order_and_then_the_end(deployed: Deployment) -> None:
    target = deployed.serve(count_to)
    assert await deployed.ask(target, 1000) == list(range(1000))


async def test_empty_stream_just_ends(deployed: Deployment) -> None:
    assert await deployed.ask(deployed.serve(count_to), 0) == []


async def test_stream_knows_when_it_has_been_read_to_its_end(deployed: Deployment) -> None:
    async def fails(request: int, _: Context) -> AsyncIterator[int]:
        for number in range(request):
            yield number
        raise InvalidRequest("no more")

    one = deployed.open(deployed.serve(echo), "x")
    assert await anext(one) == "x"
    assert one.is_over
    with pytest.raises(StopAsyncIteration):
        await anext(one)
    several, failing = (
        deployed.open(deployed.serve(handler, name), 2) for name, handler in (("n", count_to), ("f", fails))
    )
    for stream in (several, failing):
        assert await anext(stream) == 0
        assert not stream.is_over
        assert await anext(stream) == 1
    await eventually(lambda: several.is_over)
    assert not failing.is_over
    with pytest.raises(InvalidRequest):
        await anext(failing)


async def test_items_come_as_they_are_made(deployed: Deployment) -> None:
    go_on = asyncio.Event()

    async def handler(_: Any, __: Context) -> AsyncIterator[int]:
        yield 1
        await go_on.wait()
        yield 2

    stream = deployed.open(deployed.serve(handler))
    assert await anext(stream) == 1
    go_on.set()
    assert [item async for item in stream] == [2]


async def test_ready_items_are_those_that_have_come(deployed: Deployment) -> None:
    """Over twice the window, so an answer whose items are all taken this way gets new credit; large items
    among them, whose room is given back."""
    window_count = deployed.settings.channel_buffer_count
    count, large = 5 * window_count, bytes(range(256)) * 1024

    async def handler(_: Any, __: Context) -> AsyncIterator[Any]:
        for number in range(count):
            yield large if number % window_count == 3 else number

    stream = deployed.open(deployed.serve(handler))
    assert stream.take_ready() == []
    received: list[Any] = []
    with suppress(StopAsyncIteration):
        while True:
            received.append(await anext(stream))
            received += stream.take_ready()
    assert received == [large if number % window_count == 3 else number for number in range(count)]
    assert stream.is_over
    assert stream.take_ready() == []


async def test_handler_may_change_an_item_after_it_yielded_it(deployed: Deployment) -> None:
    async def handler(_: Any, __: Context) -> AsyncIterator[dict[str, int]]:
        item = {"n": 0}
        for number in range(5):
            item["n"] = number
            yield item

    answer = await deployed.ask(deployed.serve(handler))
    assert answer == [{"n": number} for number in range(5)]


async def test_bound_methods_callables_and_awaitables_can_serve(deployed: Deployment) -> None:
    class Engine:
        async def generate(self, request: Any, _: Context) -> AsyncIterator[Any]:
            yield request

        async def unary(self, request: Any, _: Context) -> Any:
            return request

        def __call__(self, request: Any, _: Context) -> asyncio.Future[Any]:
            return asyncio.ensure_future(self.unary(request, _))

    engine = Engine()
    handlers: list[Handler] = [engine.generate, engine.unary, engine, lambda r, c: engine.generate(r, c)]
    for number, handler in enumerate(handlers):
        assert await deployed.ask(deployed.serve(handler, f"s{number}"), "x") == ["x"]


async def test_five_hundred_streams_at_once(deployed: Deployment) -> None:
    async def handler(request: int, _: Context) -> AsyncIterator[int]:
        for number in range(20):
            await asyncio.sleep(0)
            yield request * 100 + number

    target = deployed.serve(handler)
    answers = await asyncio.gather(*(deployed.ask(target, number) for number in range(500)))
    assert answers == [[number * 100 + item for item in range(20)] for number in range(500)]


async def test_headers_reach_the_handler(deployed: Deployment) -> None:
    seen: list[Context] = []

    async def handler(_: Any, context: Context) -> None:
        seen.append(context)

    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    context = Context("request-1", {"user": "é"}, deadline=time.monotonic() + 60, traceparent=trace)
    await deployed.ask(deployed.serve(handler), None, context)
    [received] = seen
    assert received.id() == "request-1"
    assert received.metadata == {"user": "é"}
    assert received.traceparent == trace
    remaining_s = received.remaining_s()
    assert remaining_s is not None
    assert 55 < remaining_s <= 60


# --------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size_bytes", [1, 65_533, 65_536, 65_537, 300_000, 8 * MIB])
@pytest.mark.parametrize("kind", ["bytes", "text"])
async def test_payloads_of_all_sizes_both_ways(deployed: Deployment, size_bytes: int, kind: str) -> None:
    value: Any = (
        random.Random(size_bytes).randbytes(size_bytes) if kind == "bytes" else {"t": "é" * (size_bytes // 2)}
    )

    async def handler(request: Any, _: Context) -> AsyncIterator[Any]:
        yield request
        yield "between"
        yield request

    [first, between, last] = await deployed.ask(deployed.serve(handler), value)
    assert first == value
    assert between == "between"
    assert last == value
    assert type(first) is type(value)


async def test_request_over_the_limit_is_refused_at_once(deployed: Deployment) -> None:
    target = deployed.serve(echo)
    with pytest.raises(PayloadTooLarge) as caught:
        deployed.open(target, bytes(40 * MIB))
    assert caught.value.size_bytes == 40 * MIB
    assert caught.value.limit_bytes == (16 if deployed.server.plane == "nats" else 32) * MIB
    with pytest.raises(PayloadTooLarge):
        deployed.open(target, {"text": "x" * (40 * MIB)})
    with pytest.raises(PayloadTooLarge):
        deployed.open(target, None, Context(metadata={"much": "x" * MIB}))
    assert await deployed.ask(target, 1) == [1]


async def test_item_over_the_limit_ends_its_stream_only(plane: str) -> None:
    async with deployment(plane, max_message_bytes=MIB) as deployed:

        async def handler(request: int, _: Context) -> AsyncIterator[Any]:
            yield "first"
            yield bytes(request)

        target = deployed.serve(handler)
        other = deployed.open(deployed.serve(count_to, "other"), 500)
        assert await anext(other) == 0
        stream = deployed.open(target, 2 * MIB)
        assert await anext(stream) == "first"
        with pytest.raises(PayloadTooLarge):
            await anext(stream)
        assert [item async for item in other] == list(range(1, 500))


async def test_receiver_with_a_smaller_limit_keeps_other_requests(plane: str) -> None:
    async with deployment(plane, max_message_bytes=MIB) as deployed:
        target = deployed.serve(echo)
        roomy = make_client(PlaneSettings.load(request_plane=plane))
        other = roomy.open(deployed.serve(count_to, "other"), 500, Context())
        assert await anext(other) == 0
        with pytest.raises(PayloadTooLarge) as caught:
            await anext(roomy.open(target, bytes(8 * MIB), Context()))
        assert "1048576" in str(caught.value)
        assert [item async for item in other] == list(range(1, 500))
        await roomy.aclose()


async def test_caller_with_a_smaller_limit_keeps_other_requests(deployed: Deployment) -> None:
    async def handler(request: int, _: Context) -> AsyncIterator[bytes]:
        yield bytes(request)
        yield bytes(request)

    target = deployed.serve(handler)
    tight = make_client(
        PlaneSettings.load(request_plane=deployed.settings.request_plane, max_message_bytes=MIB)
    )
    other = tight.open(deployed.serve(count_to, "other"), 500, Context())
    assert await anext(other) == 0
    with pytest.raises(PayloadTooLarge):
        await anext(tight.open(target, 8 * MIB, Context()))
    with pytest.raises(PayloadTooLarge):
        await anext(
            tight.open(deployed.serve(echo, "one"), bytes(MIB - 1), Context(metadata={"k": "v" * MIB}))
        )
    assert [item async for item in other] == list(range(1, 500))
    await tight.aclose()


@pytest.mark.parametrize("value", [object(), 2**64, "\ud800", {"a": 1j}])
async def test_request_that_is_no_msgpack_is_a_type_error_at_once(deployed: Deployment, value: Any) -> None:
    target = deployed.serve(echo)
    with pytest.raises(TypeError):
        deployed.open(target, value)
    assert await deployed.ask(target, 1) == [1]


class Pair(NamedTuple):
    """A tuple with names."""

    left: int
    right: int


KEYS_THAT_ARRIVE_AS_LISTS = [{(1, 2): 3}, ["a", {"b": {Pair(1, 2): 3}}], ({(): "empty"},)]


@pytest.mark.parametrize("value", KEYS_THAT_ARRIVE_AS_LISTS)
async def test_unreadable_map_fails_its_own_request_only(deployed: Deployment, value: Any) -> None:
    async def give_back(_: Any, __: Context) -> AsyncIterator[Any]:
        yield 1
        yield value

    other = deployed.open(deployed.serve(count_to, "other"), 500)
    assert await anext(other) == 0
    with pytest.raises(TypeError):
        deployed.open(deployed.serve(echo), value)
    with pytest.raises(PlaneError):
        await deployed.ask(deployed.target("test"), [value, bytes(100_000)])
    with pytest.raises(HandlerFailed, match="tuple as key"):
        await deployed.ask(deployed.serve(give_back, "give back"))
    assert [item async for item in other] == list(range(1, 500))


class Colour(IntEnum):
    """An integer with a name."""

    RED = 1


async def test_types_made_of_msgpacks_own_arrive_as_those(deployed: Deployment) -> None:
    value = {"tuple": (1, (2,)), "enum": Colour.RED, "map": OrderedDict(a=Pair(1, 2)), Colour.RED: "key"}
    expected = {"tuple": [1, [2]], "enum": 1, "map": {"a": [1, 2]}, 1: "key"}
    assert await deployed.ask(deployed.serve(echo), value) == [expected]


async def test_timestamps_arrive_as_seconds(deployed: Deployment) -> None:
    """`msgpack.Timestamp` hashes to the sum of its parts: thousands of one hash would stop the event loop."""
    colliding = {msgpack.Timestamp(5000 - number, number): number for number in range(3000)}
    [answer] = await deployed.ask(deployed.serve(echo), colliding)
    assert list(answer.values()) == list(range(3000))
    assert {type(key) for key in answer} == {float}
    assert len({hash(key) for key in answer}) == 3000


@pytest.mark.parametrize("depth", [1020, 1021, 1022, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("padding_bytes", [0, 100_000])
async def test_deep_nesting_costs_no_other_request(
    deployed: Deployment, depth: int, padding_bytes: int
) -> None:
    async def handler(_: Any, __: Context) -> AsyncIterator[Any]:
        yield value
        yield value

    value: Any = [b"x" * padding_bytes]
    for _ in range(depth - 1):
        value = [value]
    nested, one_way = deployed.serve(echo, "echo"), deployed.serve(handler, "two")
    other = deployed.open(deployed.serve(count_to, "other"), 500)
    assert await anext(other) == 0
    for target, request in ((nested, value), (one_way, None)):
        try:
            answer = await deployed.ask(target, request)
        except (TypeError, HandlerFailed, InvalidRequest):
            assert depth > 1022
        else:
            assert {depth_of(item) for item in answer} == {depth}
    assert [item async for item in other] == list(range(1, 500))


# --------------------------------------------------------------------------- request streams


async def total(messages: Any, _: Context) -> int:
    return sum([message async for message in messages])


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


async def test_request_stream_starts_with_the_request(deployed: Deployment) -> None:
    target = deployed.serve(total, request_stream=True)
    assert await deployed.ask(target, 1000, messages=numbers(3)) == [1003]
    assert await deployed.ask(target, 7, messages=numbers(0)) == [7]
    assert await deployed.ask(target, 7) == [7]


async def test_both_directions_flow_at_once(deployed: Deployment) -> None:
    async def handler(messages: AsyncIterator[int], _: Context) -> AsyncIterator[int]:
        async for message in messages:
            yield message * 2

    target = deployed.serve(handler, request_stream=True)
    answer = await deployed.ask(target, 0, messages=numbers(5000))
    assert answer == [0, *(number * 2 for number in range(5000))]


async def test_large_messages_in_a_request_stream(deployed: Deployment) -> None:
    async def handler(messages: AsyncIterator[bytes], _: Context) -> AsyncIterator[int]:
        async for message in messages:
            yield len(message)

    async def source() -> AsyncIterator[bytes]:
        for _ in range(12):
            yield bytes(MIB)

    target = deployed.serve(handler, request_stream=True)
    assert await deployed.ask(target, b"", messages=source()) == [0, *[MIB] * 12]


async def test_handler_that_does_not_read_stops_the_source(deployed: Deployment) -> None:
    sent = 0
    release = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        nonlocal sent
        for number in range(10_000):
            sent = number
            yield number

    async def handler(messages: AsyncIterator[int], _: Context) -> int:
        await release.wait()
        return len([message async for message in messages])

    stream = deployed.open(deployed.serve(handler, request_stream=True), None, messages=source())
    reader = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.2)
    assert 0 < sent <= deployed.most_unread_count(1)
    release.set()
    assert await reader == 10_001


async def test_closing_kills_beside_unread_messages(deployed: Deployment) -> None:
    """The handler reads none of its messages, and they fill each buffer on the way."""
    sent, ended = 0, asyncio.Event()

    async def source() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(10_000)

    async def handler(_: AsyncIterator[bytes], __: Context) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await asyncio.sleep(0.01)
        finally:
            ended.set()

    stream = deployed.open(deployed.serve(handler, request_stream=True), None, messages=source())
    last = -1
    while sent > last:
        last = sent
        for _ in range(20):
            await anext(stream)
    await stream.aclose()
    await asyncio.wait_for(ended.wait(), 30)


async def test_answer_may_end_before_its_request_stream(deployed: Deployment) -> None:
    ended = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        try:
            while True:
                await asyncio.sleep(0)
                yield 1
        finally:
            ended.set()

    async def handler(messages: AsyncIterator[int], _: Context) -> int:
        return await anext(messages)

    assert await deployed.ask(deployed.serve(handler, request_stream=True), 5, messages=source()) == [5]
    await asyncio.wait_for(ended.wait(), 30)


async def test_source_that_waits_ends_with_the_answer(deployed: Deployment) -> None:
    ended = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        try:
            await asyncio.Event().wait()
            yield 1
        finally:
            ended.set()

    async def handler(messages: AsyncIterator[int], _: Context) -> int:
        return await anext(messages)

    assert await deployed.ask(deployed.serve(handler, request_stream=True), 5, messages=source()) == [5]
    await asyncio.wait_for(ended.wait(), 30)


async def test_error_of_the_message_source_reaches_the_reader(deployed: Deployment) -> None:
    killed = asyncio.Event()

    begun = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        yield 1
        await begun.wait()
        raise LookupError("no more")

    async def handler(messages: AsyncIterator[int], _: Context) -> int:
        begun.set()
        try:
            return len([message async for message in messages])
        finally:
            killed.set()

    stream = deployed.open(deployed.serve(handler, request_stream=True), 5, messages=source())
    with pytest.raises(LookupError):
        await anext(stream)
    await asyncio.wait_for(killed.wait(), 30)


async def test_stream_for_an_endpoint_of_single_messages_is_refused(deployed: Deployment) -> None:
    with pytest.raises(InvalidRequest):
        await deployed.ask(deployed.serve(echo), 1, messages=numbers(3))


# --------------------------------------------------------------------------- errors


async def test_handler_that_raises_before_the_first_item(deployed: Deployment) -> None:
    async def handler(_: Any, __: Context) -> Any:
        raise KeyError("missing")

    with pytest.raises(HandlerFailed, match="KeyError: 'missing'"):
        await deployed.ask(deployed.serve(handler))


async def test_items_made_before_an_exception_arrive_before_it(deployed: Deployment) -> None:
    async def handler(_: Any, __: Context) -> AsyncIterator[int]:
        yield 1
        yield 2
        raise ValueError("broken")

    stream = deployed.open(deployed.serve(handler))
    assert [await anext(stream), await anext(stream)] == [1, 2]
    with pytest.raises(HandlerFailed, match="ValueError: broken"):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@pytest.mark.parametrize("error", [InvalidRequest("no"), Draining("bye"), Overloaded("full", 0.25)])
async def test_plane_error_travels_as_it_is(deployed: Deployment, error: PlaneError) -> None:
    async def handler(_: Any, __: Context) -> Any:
        raise copy.copy(error)  # one that is raised keeps its traceback, and all that hangs on it

    with pytest.raises(type(error), match=str(error)) as caught:
        await deployed.ask(deployed.serve(handler))
    assert getattr(caught.value, "retry_after_s", None) == getattr(error, "retry_after_s", None)


async def test_exceptions_with_impossible_texts_travel_too(
    deployed: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "dynamo_redis")  # the reports of pytest-xdist carry no surrogates

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    async def handler(request: str, _: Context) -> Any:
        raise {"mute": Mute(), "surrogate": ValueError("\ud800"), "long": ValueError("x" * MIB)}[request]

    target = deployed.serve(handler)
    for request in ("mute", "surrogate", "long"):
        with pytest.raises(HandlerFailed):
            await deployed.ask(target, request)


async def test_answer_that_is_no_msgpack_is_a_handler_failure(deployed: Deployment) -> None:
    async def unary(_: Any, __: Context) -> Any:
        return object()

    async def stream(_: Any, __: Context) -> AsyncIterator[Any]:
        yield 1
        yield object()

    handlers: list[Handler] = [unary, stream]
    for number, handler in enumerate(handlers):
        with pytest.raises(HandlerFailed, match="object"):
            await deployed.ask(deployed.serve(handler, str(number)))


async def test_handler_cancelled_from_within_fails_its_request_only(deployed: Deployment) -> None:
    async def handler(_: Any, __: Context) -> Any:
        raise asyncio.CancelledError

    target = deployed.serve(handler)
    with pytest.raises(HandlerFailed):
        await deployed.ask(target)
    assert await deployed.ask(deployed.serve(echo, "echo"), 1) == [1]


async def test_unknown_subject(deployed: Deployment) -> None:
    with pytest.raises(EndpointNotFound):
        await deployed.ask(deployed.target("unknown"))


async def test_subject_is_served_once(deployed: Deployment) -> None:
    deployed.serve(echo)
    with pytest.raises(ValueError, match="test"):
        deployed.serve(echo)


async def test_no_process_at_the_address(deployed: Deployment) -> None:
    target = deployed.serve(echo)
    await deployed.server.aclose()
    with pytest.raises(CannotConnect):
        await deployed.ask(target)


@pytest.mark.parametrize("secret", [b"another secret, of another worker", None])
async def test_caller_without_the_secret_is_refused(deployed: Deployment, secret: bytes | None) -> None:
    ran = False

    async def handler(_: Any, __: Context) -> None:
        nonlocal ran
        ran = True

    target = deployed.serve(handler)
    with pytest.raises(AuthenticationFailed):
        await deployed.ask(Target(target.instance_id, target.address, target.subject, secret))
    with pytest.raises(AuthenticationFailed):
        await deployed.client.probe(Target(target.instance_id, target.address, target.subject, secret), 2)
    assert not ran


async def test_caller_with_a_secret_refuses_a_server_without(plane: str) -> None:
    settings = PlaneSettings.load(request_plane=plane, auth="off")
    server = make_server(settings, secret=None, instance_id=INSTANCE)
    await server.start()
    server.register("test", echo)
    client = make_client(settings)
    with pytest.raises(AuthenticationFailed):
        await anext(client.open(Target(INSTANCE, server.address, "test", SECRET), 1, Context()))
    assert await anext(client.open(Target(INSTANCE, server.address, "test", None), 1, Context())) == 1
    await client.aclose()
    await server.aclose()


async def test_another_instance_at_the_address_is_refused(
    deployed: Deployment,
) -> None:
    target = deployed.serve(echo)
    with pytest.raises(AuthenticationFailed):
        await deployed.ask(Target(42, target.address, target.subject, SECRET))


# --------------------------------------------------------------------------- cancelling


class Watched:
    """A handler that yields until its context is stopped."""

    def __init__(self) -> None:
        self.context: Context | None = None
        self.ended = asyncio.Event()

    async def __call__(self, _: Any, context: Context) -> AsyncIterator[str]:
        self.context = context
        try:
            while not context.is_stopped():
                yield "more"
                await asyncio.sleep(0.001)
        finally:
            self.ended.set()


async def test_stop_ends_the_answer_where_it_is(deployed: Deployment) -> None:
    watched, context = Watched(), Context()
    stream = deployed.open(deployed.serve(watched), None, context)
    assert await anext(stream) == "more"
    context.stop_generating()
    assert await _exhaust(stream) == []
    await asyncio.wait_for(watched.ended.wait(), 30)
    assert watched.context is not None
    assert watched.context.is_stopped()


async def test_kill_ends_both_sides_at_once(deployed: Deployment) -> None:
    watched, context = Watched(), Context()
    stream = deployed.open(deployed.serve(watched), None, context)
    assert await anext(stream) == "more"
    context.kill()
    with pytest.raises(RequestCancelled):
        await anext(stream)
    await asyncio.wait_for(watched.ended.wait(), 30)
    assert watched.context is not None
    assert watched.context.is_killed()


async def test_closing_the_stream_kills(deployed: Deployment) -> None:
    watched = Watched()
    async with deployed.open(deployed.serve(watched)) as stream:
        assert await anext(stream) == "more"
    await asyncio.wait_for(watched.ended.wait(), 30)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_cancelled_read_removes_no_item(deployed: Deployment) -> None:
    go_on = asyncio.Event()

    async def handler(_: Any, context: Context) -> AsyncIterator[int]:
        yield 0
        await go_on.wait()
        yield 1

    stream = deployed.open(deployed.serve(handler))
    assert await asyncio.wait_for(anext(stream), 30) == 0
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
    go_on.set()
    assert await _exhaust(stream) == [1]


async def test_closing_after_a_cancelled_read_kills(deployed: Deployment) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def handler(_: Any, context: Context) -> None:
        started.set()
        await context.async_killed_or_stopped()
        assert context.is_killed()
        ended.set()

    stream = deployed.open(deployed.serve(handler))
    reader = asyncio.ensure_future(anext(stream))
    await asyncio.wait_for(started.wait(), 30)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await stream.aclose()
    await asyncio.wait_for(ended.wait(), 30)


async def test_request_is_sent_again_as_it_was(deployed: Deployment) -> None:
    """A request can be sent again as it was, even if the caller has changed its objects since."""
    seen: list[tuple[Any, Any]] = []

    async def handler(request: Any, context: Context) -> str:
        seen.append((request, context.metadata))
        return "done"

    target = deployed.serve(handler)
    for content in (["a"], ["a" * 200_000], b"a" * 200_000):
        seen.clear()
        request = copy.copy(content)
        context = Context(metadata={"tenant": "one"})
        stream = deployed.open(target, request, context)
        if isinstance(request, list):
            request[0] = "changed"
        context.metadata["tenant"] = "two"
        again = stream.packed
        assert await _exhaust(stream) == ["done"]
        assert await deployed.ask(target, again, context) == ["done"]
        assert seen == [(content, {"tenant": "one"})] * 2


async def test_stopped_context_wakes_its_handler(deployed: Deployment) -> None:
    started, woken = asyncio.Event(), asyncio.Event()

    async def handler(_: Any, context: Context) -> None:
        started.set()
        await context.async_killed_or_stopped()
        woken.set()

    context = Context()
    reader = asyncio.ensure_future(deployed.ask(deployed.serve(handler), None, context))
    await asyncio.wait_for(started.wait(), 30)
    context.stop_generating()
    assert await reader == []
    await asyncio.wait_for(woken.wait(), 30)


async def test_cancelled_context_sends_nothing(deployed: Deployment) -> None:
    watched, context = Watched(), Context()
    target = deployed.serve(watched)
    context.stop_generating()
    with pytest.raises(RequestCancelled):
        await deployed.ask(target, None, context)
    assert watched.context is None


async def test_context_handed_on_links_the_cancellation(deployed: Deployment) -> None:
    inner, outer_context = Watched(), Context()
    inner_target = deployed.serve(inner, "inner")

    async def outer(_: Any, context: Context) -> AsyncIterator[Any]:
        async for item in deployed.open(inner_target, None, context):
            yield item

    stream = deployed.open(deployed.serve(outer, "outer"), None, outer_context)
    assert await anext(stream) == "more"
    outer_context.stop_generating()
    assert await _exhaust(stream) == []
    await asyncio.wait_for(inner.ended.wait(), 30)
    assert inner.context is not None
    assert inner.context.is_stopped()


async def test_kill_passes_down_a_chain_of_calls(deployed: Deployment) -> None:
    inner = Watched()
    inner_target = deployed.serve(inner, "inner")

    async def outer(_: Any, context: Context) -> AsyncIterator[Any]:
        async for item in deployed.open(inner_target, None, context):
            yield item

    async with deployed.open(deployed.serve(outer, "outer")) as stream:
        assert await anext(stream) == "more"
    await asyncio.wait_for(inner.ended.wait(), 30)
    assert inner.context is not None
    assert inner.context.is_killed()


async def test_failing_a_stream_from_outside(deployed: Deployment) -> None:
    watched = Watched()
    stream = deployed.open(deployed.serve(watched))
    assert await anext(stream) == "more"
    reader = asyncio.ensure_future(_exhaust(stream))
    stream.fail(InstanceRemoved("gone"))
    with pytest.raises(InstanceRemoved):
        await reader
    await asyncio.wait_for(watched.ended.wait(), 30)
    stream.fail(ConnectionLost("too late"))


async def _exhaust(stream: ResponseStream) -> list[Any]:
    return [item async for item in stream]


async def test_forgotten_instance_fails_pending_requests(deployed: Deployment) -> None:
    watched = Watched()
    target = deployed.serve(watched)
    stream = deployed.open(target)
    assert await anext(stream) == "more"
    deployed.client.forget(target)
    with pytest.raises(InstanceRemoved):
        await _exhaust(stream)
    assert await deployed.ask(deployed.serve(echo, "echo"), 1) == [1]


async def test_handler_is_cancelled_after_the_grace(plane: str) -> None:
    """The handler runs undisturbed until the grace ends; its error after the cancellation reaches no
    caller."""
    interrupted_after_s: list[float] = []

    async def handler(_: Any, __: Context) -> AsyncIterator[int]:
        yield 1
        began = time.monotonic()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        interrupted_after_s.append(time.monotonic() - began)
        yield 2
        raise AssertionError("it was not closed at its next yield")

    async with deployment(plane, cancel_grace_s=0.3) as deployed:
        async with deployed.open(deployed.serve(handler)) as stream:
            assert await anext(stream) == 1
        await eventually(lambda: deployed.server.in_flight_count == 0)
        assert interrupted_after_s[0] >= 0.29


async def test_handler_that_ends_within_the_grace_is_not_cancelled(deployed: Deployment) -> None:
    """As a handler whose clean-up needs more than one `await`, to have its engine abort."""
    told: list[str] = []

    async def handler(_: Any, context: Context) -> AsyncIterator[int]:
        try:
            yield 1
            await context.async_killed_or_stopped()
            told.append("to abort")
            await asyncio.sleep(0.02)
            told.append("it has aborted")
            yield 2
            told.append("it went on behind a yield")
        except BaseException as exc:
            told.append(type(exc).__name__)
            raise

    async with deployed.open(deployed.serve(handler)) as stream:
        assert await anext(stream) == 1
    await eventually(lambda: deployed.server.in_flight_count == 0)
    assert told == ["to abort", "it has aborted", "GeneratorExit"]


async def test_without_a_grace_a_handler_is_cancelled_at_once(plane: str) -> None:
    ended: list[str] = []

    async def handler(_: Any, __: Context) -> AsyncIterator[int]:
        yield 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async with deployment(plane, cancel_grace_s=0) as deployed:
        async with deployed.open(deployed.serve(handler)) as stream:
            assert await anext(stream) == 1
        await eventually(lambda: deployed.server.in_flight_count == 0)
        assert ended == ["cancelled"]


async def test_end_of_a_drain_cancels_at_once(plane: str) -> None:
    """Also a handler in its grace time: it cannot delay the end of the process."""

    async def handler(_: Any, __: Context) -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    async with deployment(plane, cancel_grace_s=3600) as deployed:
        target = deployed.serve(handler)
        async with deployed.open(target) as left:
            assert await anext(left) == 1
        open_one = deployed.open(target)
        assert await anext(open_one) == 1
        assert deployed.server.in_flight_count == 2
        await deployed.server.unregister("test", grace_s=0.1)
        with pytest.raises(Draining):
            await anext(open_one)
        await eventually(lambda: deployed.server.in_flight_count == 0)


async def test_killed_handler_cleans_up_before_it_counts_as_ended(deployed: Deployment) -> None:
    clean = False

    async def handler(_: Any, __: Context) -> AsyncIterator[int]:
        nonlocal clean
        try:
            for number in range(10_000):
                yield number
        finally:
            await asyncio.sleep(0.05)
            clean = True

    async with deployed.open(deployed.serve(handler)) as stream:
        assert await anext(stream) == 0
        await asyncio.sleep(0.02)  # it waits for its reader now
    await eventually(lambda: deployed.server.in_flight_count == 0)
    assert clean


# --------------------------------------------------------------------------- deadlines


async def test_deadline_ends_both_sides(deployed: Deployment) -> None:
    ended = asyncio.Event()

    async def handler(_: Any, context: Context) -> AsyncIterator[int]:
        yield 1
        await context.async_killed_or_stopped()
        assert context.is_killed()
        ended.set()

    stream = deployed.open(deployed.serve(handler), None, Context(deadline=time.monotonic() + 2.0))
    assert await anext(stream) == 1
    with pytest.raises(DeadlineExceeded):
        await anext(stream)
    await asyncio.wait_for(ended.wait(), 30)


async def test_deadline_that_has_passed_sends_nothing(deployed: Deployment) -> None:
    watched = Watched()
    target = deployed.serve(watched)
    with pytest.raises(DeadlineExceeded):
        await deployed.ask(target, None, Context(deadline=time.monotonic() - 1))
    assert watched.context is None


# --------------------------------------------------------------------------- flow control


async def test_stopped_reader_costs_bounded_memory(deployed: Deployment) -> None:
    made = 0

    async def handler(_: Any, __: Context) -> AsyncIterator[bytes]:
        nonlocal made
        for _i in range(100_000):
            made += 1
            yield b"x" * 1000

    stopped = deployed.open(deployed.serve(handler))
    assert len(await anext(stopped)) == 1000
    assert await deployed.ask(deployed.serve(count_to, "other"), 2000) == list(range(2000))
    await asyncio.sleep(0.1)
    assert made <= deployed.most_unread_count(1000)
    before = made
    for _ in range(deployed.most_unread_count(1000) // 2):
        await anext(stopped)
    await eventually(lambda: made > before)
    await stopped.aclose()


@pytest.mark.parametrize("stopped_count", [1, 5])
async def test_stopped_reader_holds_up_no_other(deployed: Deployment, stopped_count: int) -> None:
    """Not even once its answer has filled each buffer on the way, and waits at the worker."""
    made = 0

    async def handler(_: Any, __: Context) -> AsyncIterator[bytes]:
        nonlocal made
        while True:
            made += 1
            yield b"x" * 1000

    target, other = deployed.serve(handler), deployed.serve(count_to, "other")
    stopped = [deployed.open(target) for _ in range(stopped_count)]
    for stream in stopped:
        assert len(await anext(stream)) == 1000
    last = 0
    while made > last:
        last = made
        await asyncio.sleep(1.0)
    async with asyncio.timeout(30):
        for _ in range(3):
            assert await deployed.ask(other, 2000) == list(range(2000))
    before = made
    for stream in stopped:
        for _ in range(deployed.most_unread_count(1000)):
            await anext(stream)
        await stream.aclose()
    assert made > before


async def test_large_items_are_bounded_by_size_too(deployed: Deployment) -> None:
    made = 0

    async def handler(_: Any, __: Context) -> AsyncIterator[bytes]:
        nonlocal made
        for _i in range(50):
            made += 1
            yield bytes(MIB)

    stream = deployed.open(deployed.serve(handler))
    assert len(await anext(stream)) == MIB
    await asyncio.sleep(0.2)
    assert made <= 10 + deployed.most_unread_count(MIB)
    assert [len(item) async for item in stream] == [MIB] * 49


# --------------------------------------------------------------------------- admission


async def test_admission_is_bounded(plane: str) -> None:
    async with deployment(plane, max_in_flight_count=2, max_queued_count=3) as deployed:
        release, running = asyncio.Event(), 0

        async def handler(request: int, _: Context) -> int:
            nonlocal running
            running += 1
            await release.wait()
            return request

        target = deployed.serve(handler)
        readers = [asyncio.ensure_future(deployed.ask(target, number)) for number in range(5)]
        await eventually(lambda: deployed.server.in_flight_count == 5)
        with pytest.raises(Overloaded) as caught:
            await deployed.ask(target, 5)
        assert caught.value.retry_after_s
        assert running == 2
        stats = deployed.server.stats("test")
        assert stats is not None
        assert (stats.request_count, stats.error_counts) == (1, {Overloaded.code: 1})
        release.set()
        assert await asyncio.gather(*readers) == [[number] for number in range(5)]
        assert deployed.server.in_flight_count == 0


async def test_flood_of_a_caller_costs_another_one_turn(plane: str) -> None:
    async with deployment(plane, max_in_flight_count=1, max_queued_count=40) as deployed:
        gates: list[asyncio.Event] = []
        started: list[str] = []

        async def handler(request: str, _: Context) -> str:
            started.append(request)
            gates.append(asyncio.Event())
            await gates[-1].wait()
            return request

        target, other = deployed.serve(handler), make_client(deployed.settings)
        try:
            flood = [asyncio.ensure_future(deployed.ask(target, "flood")) for _ in range(41)]
            await eventually(lambda: deployed.server.in_flight_count == 41 and len(started) == 1)
            modest = asyncio.ensure_future(anext(other.open(target, "modest", Context())))
            # The newest of the flood makes room; requests of one HTTP connection may overtake each other.
            (evicted,), _ = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
            assert isinstance(evicted.exception(), Overloaded)
            assert evicted is flood[-1] or plane == "http"
            assert deployed.server.in_flight_count == 41
            for _ in range(2):
                count = len(started)
                gates[-1].set()
                await eventually(lambda count=count: len(started) > count)  # type: ignore[misc]
            assert started[-2:].count("modest") == 1
            while not all(answer.done() for answer in (*flood, modest)):
                gates[-1].set()
                await asyncio.sleep(0.001)
            assert await modest == "modest"
            flood.remove(evicted)
            assert [await answer for answer in flood] == [["flood"]] * 40
        finally:
            await other.aclose()


async def test_queued_request_that_is_cancelled_leaves_the_queue(plane: str) -> None:
    async with deployment(plane, max_in_flight_count=1, max_queued_count=1) as deployed:
        release = asyncio.Event()

        async def handler(request: int, _: Context) -> int:
            await release.wait()
            return request

        target = deployed.serve(handler)
        first = asyncio.ensure_future(deployed.ask(target, 1))
        await eventually(lambda: deployed.server.in_flight_count == 1)
        second = deployed.open(target, 2)
        await eventually(lambda: deployed.server.in_flight_count == 2)
        await second.aclose()
        await eventually(lambda: deployed.server.in_flight_count == 1)
        third = asyncio.ensure_future(deployed.ask(target, 3))
        await eventually(lambda: deployed.server.in_flight_count == 2)
        release.set()
        assert [await first, await third] == [[1], [3]]


# --------------------------------------------------------------------------- draining and closing


async def test_unregister_finishes_running_and_refuses_new_requests(deployed: Deployment) -> None:
    release = asyncio.Event()

    async def handler(_: Any, __: Context) -> str:
        await release.wait()
        return "done"

    target = deployed.serve(handler)
    reader = asyncio.ensure_future(deployed.ask(target))
    await eventually(lambda: deployed.server.in_flight_count == 1)
    leaving = asyncio.ensure_future(deployed.server.unregister("test", grace_s=5))
    await asyncio.sleep(0.02)
    with pytest.raises(Draining):
        await deployed.ask(target)
    assert await deployed.ask(deployed.serve(echo, "other"), 1) == [1]
    release.set()
    await leaving
    assert await reader == ["done"]
    with pytest.raises(EndpointNotFound):
        await deployed.ask(target)
    await deployed.server.unregister("test", grace_s=5)


async def test_requests_past_the_grace_end_as_retryable(deployed: Deployment) -> None:
    watched = Watched()
    stream = deployed.open(deployed.serve(watched))
    assert await anext(stream) == "more"
    await deployed.server.unregister("test", grace_s=0.05)
    with pytest.raises(Draining):
        await _exhaust(stream)
    await asyncio.wait_for(watched.ended.wait(), 30)


async def test_drain_finishes_what_is_under_way(deployed: Deployment) -> None:
    async def handler(request: int, _: Context) -> AsyncIterator[int]:
        for number in range(request):
            await asyncio.sleep(0.01)
            yield number

    target = deployed.serve(handler)
    readers = [asyncio.ensure_future(deployed.ask(target, 10)) for _ in range(10)]
    await eventually(lambda: deployed.server.in_flight_count == 10)
    draining = asyncio.ensure_future(deployed.server.drain(5))
    await asyncio.sleep(0.02)
    with pytest.raises(Draining):
        await deployed.ask(target, 1)
    assert await asyncio.gather(*readers) == [list(range(10))] * 10
    await draining
    late = make_client(deployed.settings)
    with pytest.raises(Draining):
        await anext(late.open(target, 1, Context()))
    await late.aclose()


async def test_closed_client_ends_its_requests_and_handlers(deployed: Deployment) -> None:
    watched = Watched()
    stream = deployed.open(deployed.serve(watched))
    assert await anext(stream) == "more"
    reader = asyncio.ensure_future(_exhaust(stream))
    await asyncio.sleep(0)
    await deployed.client.aclose()
    with pytest.raises(ConnectionLost):
        await reader
    await asyncio.wait_for(watched.ended.wait(), 30)
    await deployed.client.aclose()


async def test_closing_the_server_ends_pending_requests(deployed: Deployment) -> None:
    watched = Watched()
    stream = deployed.open(deployed.serve(watched))
    assert await anext(stream) == "more"
    await deployed.server.aclose()
    assert watched.ended.is_set()
    with pytest.raises(PlaneError):
        await _exhaust(stream)
    await deployed.server.aclose()


async def test_probe_says_whether_an_instance_answers(deployed: Deployment) -> None:
    target = deployed.serve(echo)
    await deployed.client.probe(target, 2)
    await deployed.ask(target)
    await deployed.client.probe(target, 2)
    await deployed.server.aclose()
    with pytest.raises(PlaneError):
        await deployed.client.probe(target, 2)


async def test_randomly_cancelled_requests_leave_nothing_behind(deployed: Deployment) -> None:
    rng = random.Random(1)

    async def handler(request: int, _: Context) -> AsyncIterator[int]:
        for number in range(request):
            if number % 3 == 0:
                await asyncio.sleep(0)
            yield number

    streaming, single = deployed.serve(handler, "stream"), deployed.serve(echo, "echo")

    async def caller() -> None:
        for _ in range(40):
            context = Context(deadline=time.monotonic() + 10) if rng.random() < 0.3 else Context()
            target = rng.choice((streaming, single))
            stream = deployed.open(target, rng.randrange(300), context)
            way, wanted = rng.randrange(6), rng.randrange(8)
            asyncio.get_running_loop().call_later(
                rng.random() * 0.01, (context.kill, context.stop_generating)[way % 2]
            )
            with suppress(PlaneError, TimeoutError, StopAsyncIteration):
                async with asyncio.timeout(rng.random() * 0.02 if way < 2 else 5):
                    for _i in range(wanted):
                        await anext(stream)
                    if way == 2:
                        stream.fail(InstanceRemoved("gone"))
                    elif way > 3:
                        await _exhaust(stream)
            await stream.aclose()

    await asyncio.gather(*(caller() for _ in range(50)))
    await eventually(lambda: deployed.server.in_flight_count == 0)
    assert await deployed.ask(single, "still well") == ["still well"]
    assert getattr(deployed.client, "pending_count", 0) == 0
