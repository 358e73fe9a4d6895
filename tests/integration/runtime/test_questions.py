"""Questions to instances: own times, malformed questions, and answers of other programs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import InvalidRequest
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.service import MAX_DATA_BYTES, Service, ask_all, read_answer, service_subject
from tests.tcp_plane import SECRET, running_client

LATE_S = 0.2


@asynccontextmanager
async def answering(instance_id: int, after_s: float, answer: Any) -> AsyncIterator[Target]:
    """Run an instance that answers each question so late."""

    async def handle(_: Any, __: Context) -> Any:
        await asyncio.sleep(after_s)
        return answer

    settings = PlaneSettings.load(tcp_host="127.0.0.1")
    server = TcpServer(settings, secret=SECRET, instance_id=instance_id)
    server.register(service_subject(instance_id), handle)
    await server.start()
    try:
        yield Target(instance_id, server.address, "", SECRET)
    finally:
        await server.aclose()


async def test_each_answer_has_its_own_time() -> None:
    async with (
        answering(1, 0, {"version": "1"}) as early,
        answering(2, LATE_S, {"version": "2"}) as late,
        running_client() as client,
    ):
        answers = await ask_all(client, [late, early], "ping", timeout_s=60)
    assert [answers[number].found for number in (1, 2)] == [{"version": "1"}, {"version": "2"}]
    assert answers[1].took_s < answers[2].took_s
    assert answers[2].took_s >= LATE_S


ENDPOINT = {"name": "a.b.c", "num_requests": 1, "p50_processing_time": 1.5}
MALFORMED: dict[str, Any] = {
    "nothing": None,
    "a list": [ENDPOINT],
    "bytes": {"endpoints": [], "data": b"x"},
    "endpoints in a map": {"endpoints": {"name": "a"}},
    "an endpoint that is none": {"endpoints": [ENDPOINT, 5]},
    "an endpoint without a name": {"endpoints": [{"num_requests": 1}]},
    "a text for a number": {"endpoints": [{**ENDPOINT, "p99_processing_time": "long"}]},
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_answer_is_an_error(name: str) -> None:
    async with answering(1, 0, MALFORMED[name]) as target, running_client() as client:
        found = (await ask_all(client, [target], "stats", timeout_s=60))[1].found
    assert isinstance(found, InvalidRequest)
    assert "the instance's answer" in str(found)


def test_good_answer_is_read() -> None:
    answer = {"id": "5", "endpoints": [ENDPOINT, {"name": "d"}]}
    assert read_answer(answer) == answer


@pytest.mark.parametrize("question", [None, 5, "", "pong", [], {}, {"question": []}, {"question": {}}])
async def test_malformed_question_is_invalid(question: Any) -> None:
    service = Service(TcpServer(PlaneSettings.load(), secret=None, instance_id=1), 1)
    with pytest.raises(InvalidRequest):
        await service.answer(question, Context())


async def test_stats_that_are_no_json_are_told() -> None:
    name = EndpointName("a", "b", "c")
    service = Service(TcpServer(PlaneSettings.load(), secret=None, instance_id=1), 1)
    service.add(Instance(name, InstanceId(1), {}, True, None, 0.0), lambda: {"weights": b"\0"})
    [endpoint] = service.describe("stats")["endpoints"]
    assert "data" not in endpoint
    assert endpoint["data_error"].startswith("TypeError")


@pytest.mark.parametrize("data", [2**70, "\ud800", "x" * (MAX_DATA_BYTES + 1)], ids=["int", "text", "size"])
async def test_stats_that_no_plane_carries_cost_no_others(data: Any) -> None:
    settings = PlaneSettings.load(tcp_host="127.0.0.1")
    server = TcpServer(settings, secret=SECRET, instance_id=1)
    service = Service(server, 1)
    server.register(service_subject(1), service.answer)
    for endpoint, handler in (("good", lambda: 5), ("bad", lambda: data)):
        instance = Instance(EndpointName("a", "b", endpoint), InstanceId(1), {}, True, None, 0.0)
        service.add(instance, handler)
    await server.start()
    try:
        async with running_client() as client:
            target = Target(1, server.address, "", SECRET)
            found = (await ask_all(client, [target], "stats", timeout_s=60))[1].found
    finally:
        await server.aclose()
    assert isinstance(found, dict)
    good, bad = found["endpoints"]
    assert good["data"] == 5
    assert "data" not in bad
    assert bad["data_error"]
