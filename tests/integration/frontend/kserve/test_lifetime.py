"""Calls that end early, wait, or are under way at the shutdown; and the counters behind all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_redis.config import FrontendSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.kserve import service
from dynamo_redis.frontend.kserve.apis import SERVICE
from dynamo_redis.frontend.kserve.metadata import Metadata
from dynamo_redis.frontend.kserve.server import serving_kserve
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.planes.context import Context
from tests.certificates import Authority
from tests.frontend_deployment import Deployment, until_healthy
from tests.integration.frontend.conftest import Frontend, OpenFrontend
from tests.kserve_client import KserveClient, infer_request, kserve_client, next_message, send, until_final

WITHIN_S = 30.0
SLOW_CLIENT_COUNT = 4
MOST_OF_A_CLIENT = 5_000
"""Items of an answer that is not read: the client's window and the worker's credit hold fewer."""

SMALL_WINDOW = {"grpc.http2.lookahead_bytes": 64 << 10, "grpc.http2.bdp_probe": 0}
"""Options of a client that takes 64 KiB at a time. Others take some megabytes, which are their memory."""


@pytest.fixture
async def frontend(open_frontend: OpenFrontend) -> Frontend:
    return await open_frontend(kserve_grpc_server=True, grpc_port=0)


@pytest.fixture
async def client(frontend: Frontend) -> AsyncIterator[KserveClient]:
    async with kserve_client(frontend.grpc_port) as client:
        yield client


async def endless(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
    while True:
        await asyncio.sleep(0)
        yield {"token_ids": [40]}


async def silent(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
    await asyncio.Event().wait()
    yield {}


async def counters(http: httpx.AsyncClient) -> dict[str, float]:
    """Return the sums of the frontend's gauges, and its requests by outcome."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            name = sample.name.removeprefix("dynamo_frontend_")
            if name == "requests_total":
                labels = sample.labels
                name = f"{labels['endpoint']} {labels['request_type']} {labels['error_type'] or 'success'}"
            found[name] = found.get(name, 0) + sample.value
    return found


async def until_at_rest(http: httpx.AsyncClient) -> dict[str, float]:
    async with asyncio.timeout(WITHIN_S):
        while True:
            found = await counters(http)
            if not found["inflight_requests"] and not found["queued_requests"]:
                return found
            await asyncio.sleep(0.02)


async def test_cancelled_calls_kill_their_requests(frontend: Frontend, client: KserveClient) -> None:
    frontend.worker.script = endless
    whole = client.infer(infer_request())
    stream = client.stream()
    await send(stream, infer_request(streaming=True))
    assert await next_message(stream) is not None
    await frontend.until(lambda: len(frontend.worker.contexts) == 2)
    for call in (whole, stream):
        call.cancel()
    await frontend.until(lambda: frontend.worker.ended == ["closed", "closed"])
    assert all(context.is_killed() for context in frontend.worker.contexts)
    found = await until_at_rest(frontend.http)
    assert found["completions unary cancelled"] == 1
    assert found["completions stream cancelled"] == 1


async def test_deadline_of_the_call_is_the_request_s(frontend: Frontend, client: KserveClient) -> None:
    frontend.worker.script = silent
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.infer(infer_request(), timeout=1.0)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    [context] = frontend.worker.contexts
    assert context.deadline is not None
    assert context.deadline - asyncio.get_running_loop().time() < 1.0
    await frontend.until(lambda: frontend.worker.ended == ["closed"])
    await until_at_rest(frontend.http)


async def test_passed_deadline_is_counted_as_such(deployment: Deployment) -> None:
    ports: list[int] = []
    await deployment.worker(speedup_ratio=0.01)
    url = await deployment.frontend(ports.append, kserve_grpc_server=True, grpc_port=0)
    await until_healthy(url)
    async with kserve_client(ports[0]) as client, httpx.AsyncClient(base_url=url) as http:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(
                infer_request(parameters={"max_tokens": 2000, "ignore_eos": True}), timeout=0.5
            )
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        found = await until_at_rest(http)
        assert found["completions unary response_timeout"] == 1
        assert not found["disconnected_clients"]


async def test_metadata_name_and_trace_the_request(frontend: Frontend, client: KserveClient) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await client.answer(infer_request(), metadata=(("x-request-id", "mine"), ("traceparent", trace)))
    [context] = frontend.worker.contexts
    assert (context.id(), context.traceparent) == ("mine", trace)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.infer(infer_request(), metadata=(("x-worker-instance-id", "7"),))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_requests_beyond_the_places_are_refused(open_frontend: OpenFrontend) -> None:
    frontend = await open_frontend(
        kserve_grpc_server=True, grpc_port=0, max_http_in_flight_count=1, max_http_queued_count=0
    )
    frontend.worker.script = silent
    async with kserve_client(frontend.grpc_port) as client:
        first = client.infer(infer_request())
        await frontend.until(lambda: len(frontend.worker.contexts) == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(infer_request())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata() or ())["retry-after"] == "1"
        assert (
            await frontend.http.post("/v1/completions", json={"model": "demo", "prompt": "a"})
        ).status_code == 503
        first.cancel()
    await until_at_rest(frontend.http)


async def test_slow_clients_cost_bounded_memory(frontend: Frontend) -> None:
    item_count = 0

    async def counted(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        nonlocal item_count
        async for item in endless(request, context):
            item_count += 1
            yield item

    frontend.worker.script = counted
    async with AsyncExitStack() as clients:
        for _ in range(SLOW_CLIENT_COUNT):
            client = await clients.enter_async_context(kserve_client(frontend.grpc_port, **SMALL_WINDOW))
            call = client.stream()
            await send(call, infer_request(streaming=True, parameters={"ignore_eos": True}))
            assert await next_message(call) is not None
        counts: list[int] = []
        async with asyncio.timeout(WITHIN_S):
            while len(counts) < 5 or len(set(counts[-5:])) > 1:
                await asyncio.sleep(0.1)
                counts.append(item_count)
        assert item_count < SLOW_CLIENT_COUNT * MOST_OF_A_CLIENT
        frontend.worker.script = frontend.worker.says("Hi")
        other = await clients.enter_async_context(kserve_client(frontend.grpc_port))
        assert (await other.answer(infer_request())).outputs[1].contents.bytes_contents == [b"stop"]
    await until_at_rest(frontend.http)


async def test_client_that_reads_nothing_is_given_up(open_frontend: OpenFrontend) -> None:
    frontend = await open_frontend(kserve_grpc_server=True, grpc_port=0, send_timeout_s=0.2)
    frontend.worker.script = endless
    async with kserve_client(frontend.grpc_port, **SMALL_WINDOW) as client:
        call = client.stream()
        await send(call, infer_request(streaming=True, parameters={"ignore_eos": True}))
        await frontend.until(lambda: frontend.worker.ended == ["closed"])
        found = await until_at_rest(frontend.http)
        assert found["completions stream cancelled"] == 1
        call.cancel()


async def test_drain_finishes_answers_and_ends_streams(frontend: Frontend, client: KserveClient) -> None:
    go_on = asyncio.Event()

    async def waiting(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        yield {"token_ids": [40]}
        await go_on.wait()
        yield {"token_ids": [41], "finish_reason": "stop"}

    frontend.worker.script = waiting
    idle, busy = client.stream(), client.stream()
    frontend.worker.script = frontend.worker.says("Hi")
    await send(idle, infer_request(streaming=True))
    await until_final(idle)
    frontend.worker.script = waiting
    await send(busy, infer_request(streaming=True))
    assert await next_message(busy) is not None
    whole = asyncio.ensure_future(client.answer(infer_request()))
    await frontend.until(lambda: len(frontend.worker.contexts) == 3)
    frontend.shutdown.set()
    with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
        await next_message(idle)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    go_on.set()
    assert (await until_final(busy))[1] == "stop"
    assert (await whole).outputs[1].contents.bytes_contents == [b"stop"]


async def test_idle_stream_gives_its_place_back(
    client: KserveClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "IDLE_STREAM_S", 0.3)
    stream = client.stream()
    async with asyncio.timeout(30):
        assert await stream.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "No request has come for 0.3 s" in await stream.details()


async def test_probes_are_answered_while_streams_hold_all_places(open_frontend: OpenFrontend) -> None:
    frontend = await open_frontend(kserve_grpc_server=True, grpc_port=0, max_http_connections_count=2)
    async with kserve_client(frontend.grpc_port) as client:
        streams = [client.stream(), client.stream()]
        for stream in streams:
            await send(stream, infer_request())
            await until_final(stream)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(infer_request())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "DYN_HTTP_MAX_CONNECTIONS" in (caught.value.details() or "")
        for name in ("ServerLive", "ServerReady"):
            probe: Any = client.channel.unary_unary(f"/{SERVICE}/{name}")
            assert await probe(b"") == b"\x08\x01", "the first field is true"
        await streams[0].done_writing()
        assert await next_message(streams[0]) is None
        assert (await client.answer(infer_request())).outputs


async def test_drain_leaves_clients_that_do_not_read(open_frontend: OpenFrontend) -> None:
    """The time for a drain is longer than this test waits for its end."""
    frontend = await open_frontend(kserve_grpc_server=True, grpc_port=0, send_timeout_s=0.2)
    frontend.worker.script = endless
    async with kserve_client(frontend.grpc_port, **SMALL_WINDOW) as client:
        call = client.stream()
        await send(call, infer_request(streaming=True, parameters={"ignore_eos": True}))
        await frontend.until(lambda: frontend.worker.ended == ["closed"])
        frontend.shutdown.set()
        await frontend.until(lambda: "drain gRPC" not in {task.get_name() for task in asyncio.all_tasks()})


async def test_half_closed_stream_is_answered_to_its_end(client: KserveClient) -> None:
    empty = client.stream()
    await empty.done_writing()
    assert await next_message(empty) is None
    assert await empty.code() is grpc.StatusCode.OK
    call = client.stream()
    for _ in range(20):
        await send(call, infer_request(streaming=True))
    await call.done_writing()
    for _ in range(20):
        assert (await until_final(call))[1] == "stop"
    assert await next_message(call) is None


async def test_counters_tell_of_every_outcome(frontend: Frontend, client: KserveClient) -> None:
    await client.answer(infer_request())
    call = client.stream()
    await send(call, infer_request(streaming=True))
    await until_final(call)
    await call.done_writing()
    assert await next_message(call) is None
    found = await until_at_rest(frontend.http)
    assert (found["completions unary success"], found["completions stream success"]) == (1, 1)


async def test_kserve_serves_beside_http(deployment: Deployment) -> None:
    ports: list[int] = []
    await deployment.worker(migration_limit=1)
    url = await deployment.frontend(ports.append, kserve_grpc_server=True, grpc_port=0)
    await until_healthy(url)
    async with kserve_client(ports[0]) as client, httpx.AsyncClient(base_url=url) as http:
        given = {"max_tokens": 7, "ignore_eos": True}
        answer = await client.answer(infer_request(parameters=given))
        body = {"model": "demo", "prompt": "Hello!", **given}
        said = (await http.post("/v1/completions", json=body)).json()["choices"][0]
        text, reason = answer.outputs
        assert text.contents.bytes_contents == [said["text"].encode()]
        assert reason.contents.bytes_contents == [b"length"]


async def test_port_of_another_program_is_refused(frontend: Frontend) -> None:
    async def never_asked(*_: object) -> None:
        raise AssertionError("the port has two servers")

    settings = FrontendSettings.load(http_host="127.0.0.1", grpc_port=frontend.grpc_port)
    metadata = Metadata(frontend.models, frontend.runtime.registry)
    server = serving_kserve(never_asked, metadata, settings, lambda: asyncio.sleep(0), 1)
    with pytest.raises(ConfigError, match="--grpc-port"):
        await server.__aenter__()


async def test_tls_follows_a_changed_certificate(open_frontend: OpenFrontend, tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    identity = old.issue("localhost")
    settings = {"tls_cert_path": identity.cert, "tls_key_path": identity.key}
    frontend = await open_frontend(kserve_grpc_server=True, grpc_port=0, **settings)

    async def answers(authority: Authority) -> bool:
        credentials = grpc.ssl_channel_credentials(authority.path.read_bytes())
        options = [("grpc.use_local_subchannel_pool", 1)]
        target = f"localhost:{frontend.grpc_port}"
        async with grpc.aio.secure_channel(target, credentials, options=options) as channel:
            try:
                return (await KserveClient(channel).answer(infer_request())).model_name == "demo"
            except grpc.aio.AioRpcError:
                return False

    assert await answers(old)
    key = identity.key.read_bytes()
    identity.key.write_bytes(new.issue("localhost").key.read_bytes())  # of another certificate
    assert await answers(old)
    identity.key.write_bytes(key)
    new.issue("localhost").move_to(identity)
    async with asyncio.timeout(WITHIN_S):
        while not await answers(new):
            await asyncio.sleep(0.05)
    assert not await answers(old)
