"""`/health`, `/live` and `/metrics` of a process, and the canary requests that `/health` depends on."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_redis.config import SystemSettings
from dynamo_redis.errors import ConfigError, InvalidRequest, NoInstances
from dynamo_redis.names import format_instance_id
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime import Client, DistributedRuntime
from dynamo_redis.runtime.system import server as system_server
from dynamo_redis.runtime.system.health import ProcessState
from dynamo_redis.runtime.system.server import MAX_REQUEST_COUNT, EventLoop, LoopBusy, RuntimeServer
from dynamo_redis.testing import RuntimeFactory

ENDPOINT = "dynamo.backend.generate"
WITHIN_S = 30.0


def fetch(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    """Return status and body."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=WITHIN_S)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


async def get(runtime: DistributedRuntime, path: str) -> tuple[int, Any]:
    assert runtime.system_address is not None
    status, body = await asyncio.to_thread(fetch, runtime.system_address, path)
    return status, json.loads(body)


async def samples(runtime: DistributedRuntime) -> dict[tuple[str, str], tuple[float, dict[str, str]]]:
    """Return the metrics: `(name, le or error_type)` to value and labels."""
    assert runtime.system_address is not None
    status, text = await asyncio.to_thread(fetch, runtime.system_address, "/metrics")
    assert status == 200
    return {
        (sample.name, sample.labels.get("le") or sample.labels.get("error_type", "")): (
            sample.value,
            sample.labels,
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not await holds():
            await asyncio.sleep(0.05)


async def count_to(request: int) -> AsyncIterator[int]:
    if request < 0:
        raise InvalidRequest("count upwards")
    for number in range(request):
        yield number


@pytest.fixture
async def worker(dynamo_runtime_factory: RuntimeFactory) -> DistributedRuntime:
    return await dynamo_runtime_factory(system_port=0, system_host="127.0.0.1")


async def open_client(make: RuntimeFactory) -> Client:
    client = await (await make()).endpoint(ENDPOINT).client()
    await client.wait_for_instances()
    return client


async def ask(client: Client, request: Any) -> list[Any]:
    return [item async for item in await client.round_robin(request, annotated=False)]


async def test_there_is_no_port_by_default(dynamo_runtime: DistributedRuntime) -> None:
    assert dynamo_runtime.system_address is None
    assert "system port" not in {thread.name for thread in threading.enumerate()}


async def test_health_follows_the_life_of_a_process(worker: DistributedRuntime) -> None:
    status, body = await get(worker, "/health")
    assert (status, body["status"], body["endpoints"]) == (503, "notready", {})
    assert body["reasons"] == ["the process has not begun to serve yet"]

    served = await worker.endpoint(ENDPOINT).start_serving(count_to)
    status, body = await get(worker, "/health")
    assert (status, body["status"], body["endpoints"]) == (200, "ready", {"generate": "ready"})
    assert body["registry"] == "connected"
    assert body["uptime"]["secs"] >= 0

    await served.leave()
    status, body = await get(worker, "/health")
    assert (status, body["endpoints"]) == (503, {"generate": "notready"})
    assert body["reasons"] == [f"{ENDPOINT}: it has left the registry"]

    await served.announce()
    assert (await get(worker, "/health"))[0] == 200
    worker.shutdown()
    status, body = await get(worker, "/health")
    assert (status, body["reasons"]) == (503, ["the process is shutting down"])
    assert await get(worker, "/live") == (200, {"status": "live"})


async def test_endpoints_of_one_name_are_told_apart(worker: DistributedRuntime) -> None:
    for component in ("backend", "prefill"):
        await worker.endpoint(f"dynamo.{component}.generate").start_serving(count_to)
    _, body = await get(worker, "/health")
    assert set(body["endpoints"]) == {"dynamo.backend.generate", "dynamo.prefill.generate"}


async def test_a_process_without_endpoints_says_that_it_serves(worker: DistributedRuntime) -> None:
    worker.note_serving()
    assert (await get(worker, "/health"))[0] == 200


async def test_metrics_have_the_names_of_dynamo(
    worker: DistributedRuntime, dynamo_runtime_factory: RuntimeFactory
) -> None:
    await worker.endpoint(ENDPOINT).start_serving(count_to, metrics_labels=[("model", "qwen")])
    client = await open_client(dynamo_runtime_factory)
    for _ in range(3):
        await ask(client, 2)
    with pytest.raises(InvalidRequest):
        await ask(client, -1)
    found = await samples(worker)
    value, labels = found["dynamo_component_requests_total", ""]
    worker_id = format_instance_id(worker.instance_id)
    assert value == 4
    assert labels == {
        "dynamo_namespace": "dynamo",
        "dynamo_component": "backend",
        "dynamo_endpoint": "generate",
        "worker_id": worker_id,
        "model": "qwen",
    }
    assert found["dynamo_component_errors_total", InvalidRequest.code][0] == 1
    assert found["dynamo_component_inflight_requests", ""][0] == 0
    assert found["dynamo_component_cancellation_total", ""][0] == 0
    assert found["dynamo_component_request_duration_seconds_count", ""][0] == 4
    assert found["dynamo_component_request_duration_seconds_bucket", "+Inf"][0] == 4
    assert 0 < found["dynamo_component_request_duration_seconds_sum", ""][0] < 4 * WITHIN_S
    assert found["dynamo_component_uptime_seconds", ""][1] == {"worker_id": worker_id}
    assert found["dynamo_redis_registry_connected", ""][0] == 1
    assert found["dynamo_redis_registry_outages_total", ""][0] == 0
    assert found["dynamo_redis_registry_command_duration_seconds_count", ""][0] > 0
    assert 0 < found["dynamo_redis_registry_command_duration_seconds_sum", ""][0] < WITHIN_S
    assert found["dynamo_redis_endpoint_ready", ""][0] == 1


async def test_requests_under_way_and_left_are_counted(
    worker: DistributedRuntime, dynamo_runtime_factory: RuntimeFactory
) -> None:
    async def wait(_: Any) -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(WITHIN_S)

    await worker.endpoint(ENDPOINT).start_serving(wait)
    client = await open_client(dynamo_runtime_factory)
    answer = await client.round_robin(None, annotated=False)
    assert await anext(answer) == 1
    assert (await samples(worker))["dynamo_component_inflight_requests", ""][0] == 1
    await answer.aclose()

    async def is_counted() -> bool:
        return (await samples(worker))["dynamo_component_cancellation_total", ""][0] == 1

    await until(is_counted)


@pytest.mark.parametrize(
    "labels",
    [[("not a name", "x")], [("__own", "x")], [("dynamo_endpoint", "x")], [("a", "1"), ("a", "2")]],
)
async def test_wrong_labels_are_refused(worker: DistributedRuntime, labels: list[tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match="metrics_labels"):
        await worker.endpoint(ENDPOINT).start_serving(count_to, metrics_labels=labels)
    assert (await get(worker, "/health"))[1]["endpoints"] == {}


async def test_other_paths_and_methods_are_answered(worker: DistributedRuntime) -> None:
    assert worker.system_address is not None
    status, body = await get(worker, "/other?x=1")
    assert (status, body["error"]) == (404, "there is no /other here: /health, /live, /metrics")
    assert await asyncio.to_thread(fetch, worker.system_address, "/live", "HEAD") == (200, "")
    status, text = await asyncio.to_thread(fetch, worker.system_address, "/live", "POST")
    assert (status, json.loads(text)) == (501, {"error": "Unsupported method ('POST')"})


async def test_a_port_in_use_is_an_error(dynamo_runtime_factory: RuntimeFactory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"DYN_SYSTEM_PORT: cannot listen on 127.0.0.1:{port}"):
            await dynamo_runtime_factory(system_port=port, system_host="127.0.0.1")


async def test_the_port_closes_with_the_runtime(worker: DistributedRuntime) -> None:
    assert worker.system_address is not None
    await worker.aclose()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.to_thread(fetch, worker.system_address, "/live")


async def test_port_closes_while_the_executor_is_taken() -> None:
    loop, release = asyncio.get_running_loop(), threading.Event()
    executor = ThreadPoolExecutor(1)
    loop.set_default_executor(executor)
    taken = loop.run_in_executor(None, release.wait)
    settings = SystemSettings.load(system_port=0, system_host="127.0.0.1")
    server = RuntimeServer(settings, cast("ProcessState", None), 0.0)
    try:
        async with asyncio.timeout(WITHIN_S):
            await server.aclose()
            await server.aclose()
    finally:
        release.set()
        await taken
        executor.shutdown()
    host, _, port = server.address.rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=WITHIN_S)


WITHOUT_FILES = """
import asyncio, os, resource, socket, time
from contextlib import suppress
from dynamo_redis.config import SystemSettings
from dynamo_redis.runtime.system.server import RuntimeServer

async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    server = RuntimeServer(SystemSettings.load(system_port=0, system_host="127.0.0.1"), None, 0.0)
    caller = socket.socket()
    with suppress(OSError):
        while True:
            os.dup(0)
    host, _, port = server.address.rpartition(":")
    caller.connect((host, int(port)))
    before_s = time.process_time()
    await asyncio.sleep(1)
    print(time.process_time() - before_s, flush=True)
    os._exit(0)

asyncio.run(main())
"""


async def test_port_without_files_takes_no_cpu() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WITHOUT_FILES, stdout=asyncio.subprocess.PIPE
    )
    shown, _ = await process.communicate()
    assert float(shown) < 0.5


async def test_idle_connections_do_not_keep_probes_out(
    worker: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_server._Handler, "timeout", 10 * WITHIN_S)
    assert worker.system_address is not None
    host, _, port = worker.system_address.rpartition(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(2 * MAX_REQUEST_COUNT)]
    try:
        for _ in range(3):
            assert (await get(worker, "/live"))[0] == 200

        async def are_few() -> bool:
            return (
                sum("process_request" in thread.name for thread in threading.enumerate()) <= MAX_REQUEST_COUNT
            )

        await until(are_few)
    finally:
        for connection in idle:
            connection.close()


async def test_a_busy_event_loop_is_named_and_alive(worker: DistributedRuntime) -> None:
    assert worker.system_address is not None
    found: list[tuple[int, str]] = []

    def probe() -> None:
        assert worker.system_address is not None
        found.append(fetch(worker.system_address, "/health"))
        found.append(fetch(worker.system_address, "/live"))

    thread = threading.Thread(target=probe)
    thread.start()
    thread.join(WITHIN_S)  # the event loop's thread waits here, as in a handler that blocks
    (health_status, health), (live_status, live) = found
    assert (health_status, live_status) == (503, 200)
    assert "the event loop has been busy for" in health
    assert "the event loop has been busy for" in live


async def test_a_hung_event_loop_is_not_live(dynamo_runtime_factory: RuntimeFactory) -> None:
    runtime = await dynamo_runtime_factory(system_port=0, system_host="127.0.0.1", loop_stall_s=1.5)
    found: list[int] = []

    def probe() -> None:
        assert runtime.system_address is not None
        deadline = time.monotonic() + WITHIN_S
        while 503 not in found and time.monotonic() < deadline:
            found.append(fetch(runtime.system_address, "/live")[0])

    thread = threading.Thread(target=probe)
    thread.start()
    thread.join(2 * WITHIN_S)
    assert found[0] == 200
    assert found[-1] == 503
    assert (await get(runtime, "/live"))[0] == 200


async def test_a_hung_event_loop_is_not_asked_without_end() -> None:
    loop = EventLoop(asyncio.get_running_loop())
    called = 0

    def call() -> None:
        nonlocal called
        called += 1

    def ask_often() -> None:
        def one() -> None:
            with pytest.raises(LoopBusy):
                loop.call(call)

        threads = [threading.Thread(target=one) for _ in range(3 * MAX_REQUEST_COUNT)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WITHIN_S)

    asking = threading.Thread(target=ask_often)
    asking.start()
    asking.join(WITHIN_S)
    await asyncio.sleep(0)
    assert called == MAX_REQUEST_COUNT
    await asyncio.to_thread(loop.call, call)
    assert called == MAX_REQUEST_COUNT + 1


# --------------------------------------------------------------------------- canary requests


class Engine:
    """A handler that answers unless told otherwise."""

    def __init__(self) -> None:
        self.canaries: list[Any] = []
        self.answers = asyncio.Event()
        self.answers.set()
        self.answers_requests = asyncio.Event()
        self.answers_requests.set()
        self.error: Exception | None = None

    async def generate(self, request: Any) -> AsyncIterator[str]:
        if request == {"canary": True}:
            self.canaries.append(request)
        else:
            await self.answers_requests.wait()
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        yield "token"
        yield "another"


@pytest.fixture
async def canary_worker(dynamo_runtime_factory: RuntimeFactory) -> DistributedRuntime:
    return await dynamo_runtime_factory(
        system_port=0,
        system_host="127.0.0.1",
        health_check_enabled=True,
        canary_wait_s=0.1,
        health_check_timeout_s=0.5,
    )


async def has_health(runtime: DistributedRuntime, status: int) -> bool:
    return (await get(runtime, "/health"))[0] == status


async def test_a_silent_engine_is_left_out_until_it_answers(
    canary_worker: DistributedRuntime, dynamo_runtime_factory: RuntimeFactory
) -> None:
    engine = Engine()
    await canary_worker.endpoint(ENDPOINT).start_serving(
        engine.generate, health_check_payload={"canary": True}
    )
    client = await open_client(dynamo_runtime_factory)
    assert await ask(client, 1) == ["token", "another"]

    engine.answers.clear()
    await until(lambda: has_health(canary_worker, 503))
    _, body = await get(canary_worker, "/health")
    assert body["endpoints"] == {"generate": "notready"}
    assert body["reasons"] == [f"{ENDPOINT}: the canary request had no answer within 0.5 s"]
    assert (await samples(canary_worker))["dynamo_redis_endpoint_ready", ""][0] == 0

    async def is_left_out() -> bool:
        return not any(instance.ready for instance in client.instances())

    await until(is_left_out)
    engine.answers.set()
    await until(lambda: has_health(canary_worker, 200))

    async def answers() -> bool:
        try:
            return await ask(client, 1) == ["token", "another"]
        except NoInstances:
            return False

    await until(answers)


async def test_a_failing_engine_is_named(canary_worker: DistributedRuntime) -> None:
    engine = Engine()
    engine.error = RuntimeError("CUDA error")
    await canary_worker.endpoint(ENDPOINT).start_serving(
        engine.generate, health_check_payload={"canary": True}
    )
    await until(lambda: has_health(canary_worker, 503))
    _, body = await get(canary_worker, "/health")
    assert body["reasons"] == [f"{ENDPOINT}: the canary request failed: RuntimeError: CUDA error"]


async def test_canaries_are_no_requests(canary_worker: DistributedRuntime) -> None:
    engine = Engine()
    await canary_worker.endpoint(ENDPOINT).start_serving(
        engine.generate, health_check_payload={"canary": True}
    )

    async def has_asked() -> bool:
        return len(engine.canaries) >= 3

    await until(has_asked)
    assert (await samples(canary_worker))["dynamo_component_requests_total", ""][0] == 0


async def test_handler_may_take_its_canary_apart(canary_worker: DistributedRuntime) -> None:
    canaries = []

    async def take_apart(request: dict[str, list[int]]) -> AsyncIterator[int]:
        canaries.append(dict(request))
        yield request.pop("tokens").pop()

    await canary_worker.endpoint(ENDPOINT).start_serving(take_apart, health_check_payload={"tokens": [1]})

    async def has_asked() -> bool:
        return len(canaries) >= 3

    await until(has_asked)
    assert [canary.keys() for canary in canaries] == [{"tokens"}] * len(canaries)
    assert await has_health(canary_worker, 200)


async def test_canary_survives_callbacks_that_raise(canary_worker: DistributedRuntime) -> None:
    answers = asyncio.Event()

    def fail(_: Any) -> None:
        raise RuntimeError("a bug of the handler")

    async def generate(_: Any, context: Context) -> AsyncIterator[int]:
        context.on_cancel(fail)
        await answers.wait()
        yield 1

    await canary_worker.endpoint(ENDPOINT).start_serving(generate, health_check_payload={"canary": True})
    await until(lambda: has_health(canary_worker, 503))
    answers.set()
    await until(lambda: has_health(canary_worker, 200))


async def test_a_busy_endpoint_gets_no_canary(
    canary_worker: DistributedRuntime, dynamo_runtime_factory: RuntimeFactory
) -> None:
    engine = Engine()
    engine.answers_requests.clear()
    await canary_worker.endpoint(ENDPOINT).start_serving(
        engine.generate, health_check_payload={"canary": True}
    )
    client = await open_client(dynamo_runtime_factory)
    asking = asyncio.create_task(ask(client, 1))

    async def is_busy() -> bool:
        return (await samples(canary_worker))["dynamo_component_inflight_requests", ""][0] == 1

    await until(is_busy)
    asked_count = len(engine.canaries)
    await asyncio.sleep(1.0)
    assert len(engine.canaries) <= asked_count + 1  # one may have been on its way
    engine.answers_requests.set()
    assert await asking == ["token", "another"]


async def test_canaries_are_off_by_default(
    worker: DistributedRuntime, dynamo_runtime_factory: RuntimeFactory
) -> None:
    runtime = await dynamo_runtime_factory(canary_wait_s=0.05)
    engine = Engine()
    await runtime.endpoint(ENDPOINT).start_serving(engine.generate, health_check_payload={"canary": True})
    await asyncio.sleep(0.5)
    assert engine.canaries == []


async def test_a_canary_ends_with_its_endpoint(canary_worker: DistributedRuntime) -> None:
    engine = Engine()
    serving = canary_worker.endpoint(ENDPOINT).serve_endpoint(
        engine.generate, health_check_payload={"canary": True}
    )

    async def has_asked() -> bool:
        return bool(engine.canaries)

    await until(has_asked)
    canary_worker.shutdown()
    await serving
    await canary_worker.aclose()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("canary")]
