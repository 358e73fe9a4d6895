"""Workers and clients on every request plane: the same calls, the stats, two planes at once, a move."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats

from dynamo_redis.errors import ConfigError, InvalidRequest, NoInstances
from dynamo_redis.names import format_instance_id
from dynamo_redis.runtime import Client, DistributedRuntime, PyAsyncRequestStream
from dynamo_redis.testing import RuntimeFactory
from tests.nats_server import NatsServer, find_nats_server

ENDPOINT = "dynamo.backend.generate"
PLANES = ("tcp", "http", "nats", "redis")


@pytest.fixture
def nats_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if find_nats_server() is None:
        pytest.skip("no nats-server on this machine; on Debian and Ubuntu: apt-get install nats-server")
    with NatsServer(tmp_path) as server:
        monkeypatch.setenv("NATS_SERVER", server.url)
        yield server.url


@pytest.fixture(params=PLANES)
def plane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DYN_HTTP_RPC_PORT", "0")
    if request.param == "nats":
        request.getfixturevalue("nats_url")
    return str(request.param)


async def count_to(request: int) -> AsyncIterator[int]:
    if request < 0:
        raise InvalidRequest("count upwards")
    for number in range(request):
        yield number


async def serve(runtime: DistributedRuntime, **options: Any) -> None:
    await runtime.endpoint(ENDPOINT).start_serving(count_to, **options)


async def open_client(runtime: DistributedRuntime, count: int = 1) -> Client:
    client = await runtime.endpoint(ENDPOINT).client()
    async with asyncio.timeout(10):
        while len(client.instance_ids()) < count:
            await client.wait_for_change(0.1)
    return client


async def ask(client: Client, request: int) -> list[int]:
    return [item async for item in await client.round_robin(request, annotated=False)]


async def test_a_worker_and_a_client_on_each_plane(
    plane: str, dynamo_runtime_factory: RuntimeFactory
) -> None:
    worker = await dynamo_runtime_factory(request_plane=plane.upper())
    await serve(worker)
    client = await open_client(await dynamo_runtime_factory(request_plane=plane))
    assert await ask(client, 3) == [0, 1, 2]
    with pytest.raises(InvalidRequest, match="count upwards"):
        await ask(client, -1)


async def test_stats_count_what_was_asked(plane: str, dynamo_runtime_factory: RuntimeFactory) -> None:
    worker = await dynamo_runtime_factory(request_plane=plane)
    await serve(worker, stats_handler=lambda: {"kv_active_blocks": 7})
    client = await open_client(await dynamo_runtime_factory(request_plane=plane))
    for _ in range(4):
        await ask(client, 2)
    with pytest.raises(InvalidRequest):
        await ask(client, -1)
    [stats] = await client.scrape_stats()
    assert ServiceStats.from_dict(stats).id == format_instance_id(worker.instance_id)
    assert stats["metadata"] == {"plane": plane}
    [endpoint] = stats["endpoints"]
    assert (endpoint["name"], endpoint["num_requests"], endpoint["num_errors"]) == (ENDPOINT, 5, 1)
    assert endpoint["last_error"].startswith("InvalidRequest")
    assert endpoint["data"] == {"kv_active_blocks": 7}
    assert endpoint["in_flight"] == 0
    assert endpoint["processing_time"] == pytest.approx(5 * endpoint["average_processing_time"], abs=5)
    assert 0 < endpoint["p50_processing_time"] <= endpoint["p99_processing_time"]


async def test_an_instance_that_does_not_answer_is_named(dynamo_runtime_factory: RuntimeFactory) -> None:
    worker = await dynamo_runtime_factory()
    await serve(worker)
    client = await open_client(await dynamo_runtime_factory())
    assert worker._server is not None
    await worker._server.aclose()
    [stats] = await client.scrape_stats(1.0)
    assert stats["id"] == format_instance_id(worker.instance_id)
    assert stats["error"]


async def test_messages_both_ways(plane: str, dynamo_runtime_factory: RuntimeFactory) -> None:
    async def add_up(request_stream: PyAsyncRequestStream) -> AsyncIterator[int]:
        total = 0
        async for number in request_stream:
            total += number
            yield total
        yield -1

    async def numbers() -> AsyncIterator[int]:
        for number in range(1, 300):
            yield number

    worker = await dynamo_runtime_factory(request_plane=plane)
    serving = worker.endpoint(ENDPOINT).serve_bidirectional_endpoint(add_up)
    client = await open_client(await dynamo_runtime_factory(request_plane=plane))
    answer = [item async for item in await client.bidirectional(numbers(), annotated=False)]
    assert answer == [sum(range(1, last + 1)) for last in range(1, 300)] + [-1]
    worker.shutdown()
    await serving


async def test_a_client_of_another_plane_is_told_at_once(
    dynamo_runtime_factory: RuntimeFactory, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await dynamo_runtime_factory(request_plane="tcp")
    await serve(worker)
    runtime = await dynamo_runtime_factory(request_plane="redis")
    client = await runtime.endpoint(ENDPOINT).client()
    said = f"instance {worker.instance_id:x} of {ENDPOINT} serves tcp, this client speaks redis"
    with pytest.raises(NoInstances, match=said):
        await ask(client, 1)
    with pytest.raises(NoInstances, match=said):
        await client.direct(1, worker.instance_id)
    assert said in caplog.text


async def test_a_client_names_one_plane(dynamo_runtime_factory: RuntimeFactory) -> None:
    runtime = await dynamo_runtime_factory(request_plane="redis,tcp")
    with pytest.raises(
        ConfigError, match=r"Invalid request plane mode: 'redis,tcp'\. Valid options are: tcp"
    ):
        await runtime.endpoint(ENDPOINT).client()


@pytest.mark.parametrize("moves", [("nats", "tcp"), ("nats", "http"), ("tcp", "http")], ids="→".join)
async def test_a_deployment_moves_without_a_failed_request(
    moves: tuple[str, str],
    nats_url: str,
    monkeypatch: pytest.MonkeyPatch,
    dynamo_runtime_factory: RuntimeFactory,
) -> None:
    """The steps of docs/migration.md: workers serve both planes, then the clients move, then the workers."""
    monkeypatch.setenv("DYN_HTTP_RPC_PORT", "0")
    old, new = moves
    stop, answers, failures = asyncio.Event(), [0], []

    async def call_on(client: Client) -> None:
        while not stop.is_set():
            try:
                assert await ask(client, 3) == [0, 1, 2]
                answers[0] += 1
            except Exception as exc:  # noqa: BLE001 - whatever fails here has failed a user
                failures.append(exc)
                return

    async def replace(workers: list[DistributedRuntime], planes: str) -> list[DistributedRuntime]:
        """Start new workers, then stop the former ones, one after the other."""
        fresh = []
        for former in workers:
            fresh.append(await dynamo_runtime_factory(request_plane=planes))
            await serve(fresh[-1])
            await asyncio.sleep(0.2)
            former.shutdown()
            await former.aclose()
        return fresh

    async def answered(count: int) -> None:
        async with asyncio.timeout(20):
            goal = answers[0] + count
            while answers[0] < goal and not failures:
                await asyncio.sleep(0.01)

    workers = [await dynamo_runtime_factory(request_plane=old) for _ in range(2)]
    for worker in workers:
        await serve(worker)
    clients = [await open_client(await dynamo_runtime_factory(request_plane=old))]
    callers = [asyncio.create_task(call_on(clients[0])) for _ in range(4)]
    await answered(50)
    workers = await replace(workers, f"{old},{new}")
    await answered(50)
    clients.append(await open_client(await dynamo_runtime_factory(request_plane=new), 2))
    callers += [asyncio.create_task(call_on(clients[1])) for _ in range(4)]
    await answered(50)
    for caller in callers[:4]:
        caller.cancel()  # the former clients leave
    await answered(50)
    workers = await replace(workers, new)
    await answered(50)
    stop.set()
    await asyncio.gather(*callers[4:])
    assert not failures


async def test_tools_of_nats_see_every_instance(
    nats_url: str, dynamo_runtime_factory: RuntimeFactory
) -> None:
    workers = [await dynamo_runtime_factory(request_plane="nats") for _ in range(3)]
    for worker in workers:
        await serve(worker, stats_handler=lambda: [1])
    ids = {format_instance_id(worker.instance_id) for worker in workers}
    client = await nats.connect(nats_url)
    try:

        async def answers(subject: str) -> list[dict[str, Any]]:
            inbox = client.new_inbox()
            subscription = await client.subscribe(inbox)
            await client.publish(subject, b"", reply=inbox)
            return [json.loads((await subscription.next_msg(5)).data) for _ in range(3)]

        assert {ServicePing.from_dict(one).id for one in await answers("$SRV.PING")} == ids
        infos = [ServiceInfo.from_dict(one) for one in await answers("$SRV.INFO.dynamo_redis")]
        assert {info.id for info in infos} == ids
        assert {endpoint.name for info in infos for endpoint in info.endpoints} == {ENDPOINT}
        stats = [ServiceStats.from_dict(one) for one in await answers("$SRV.STATS")]
        assert [endpoint.data for one in stats for endpoint in one.endpoints] == [[1]] * 3
        one = await client.request(f"$SRV.PING.dynamo_redis.{min(ids)}", b"", timeout=5)
        assert json.loads(one.data)["id"] == min(ids)
    finally:
        await client.close()
