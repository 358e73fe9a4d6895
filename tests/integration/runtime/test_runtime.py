"""Workers and clients on a real Redis and real sockets."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dynamo_redis.errors import ConfigError, InvalidRequest, NoInstances, StoreUnavailable
from dynamo_redis.names import INSTANCES
from dynamo_redis.runtime import (
    Client,
    Context,
    DistributedRuntime,
    Settings,
    UnaryClient,
    dynamo_endpoint,
    dynamo_worker,
    serve_unary_endpoint,
)
from dynamo_redis.store.server import EmbeddedServer

OpenRuntime = Callable[..., Awaitable[DistributedRuntime]]

ENDPOINT = "dynamo.backend.generate"


async def collect(call: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in call]


async def until(condition: Callable[[], bool], within_s: float = 5) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


class Counter:
    """A handler that counts up to the request, and records its calls."""

    def __init__(self, name: str = "", pause_s: float = 0) -> None:
        self.name = name
        self.pause_s = pause_s
        self.started = 0
        self.cancelled = 0

    async def generate(self, request: int, context: Context) -> AsyncIterator[Any]:
        self.started += 1
        try:
            for number in range(request):
                if self.pause_s:
                    await asyncio.sleep(self.pause_s)
                yield f"{self.name}{number}"
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise


async def serve(runtime: DistributedRuntime, handler: Any, endpoint: str = ENDPOINT) -> None:
    await runtime.endpoint(endpoint).start_serving(handler)


async def client_of(runtime: DistributedRuntime, count: int, endpoint: str = ENDPOINT) -> Client:
    client = await runtime.endpoint(endpoint).client()
    await until(lambda: len(client.instance_ids()) == count)
    return client


async def test_worker_is_found_and_answers(open_runtime: OpenRuntime) -> None:
    worker, caller = await open_runtime(), await open_runtime()
    await serve(worker, Counter().generate)
    client = await client_of(caller, 1)
    assert client.instance_ids() == [worker.instance_id]
    assert [item.data() for item in [i async for i in await client.round_robin(3)]] == ["0", "1", "2"]
    assert await collect(await client.direct(2, worker.instance_id, annotated=False)) == ["0", "1"]


async def test_older_chain_names_the_same_endpoint(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    component = runtime.namespace("dynamo").component("backend")
    await component.create_service()
    assert component.endpoint("generate").name == runtime.endpoint("dyn://dynamo.backend.generate").name
    with pytest.raises(ValueError, match="does not name an endpoint"):
        runtime.endpoint("only.two")


async def test_record_lives_as_long_as_the_worker(open_runtime: OpenRuntime) -> None:
    worker, caller = await open_runtime(), await open_runtime()
    await serve(worker, Counter().generate)
    (record,) = (await caller.registry.get_prefix(INSTANCES)).records
    stored = json.loads(record.value)
    assert stored["type"] == "Endpoint"
    assert stored["instance_id"] == int(worker.instance_id)
    assert record.lease == worker.registry.lease_id
    assert stored["transport"]["tcp"].endswith(f"/{worker.instance_id:x}/dynamo/backend/generate")
    await worker.aclose()
    assert (await caller.registry.get_prefix(INSTANCES)).records == ()


async def test_instance_can_sleep_and_wake(open_runtime: OpenRuntime) -> None:
    worker = await open_runtime()
    await serve(worker, Counter().generate)
    client = await client_of(await open_runtime(), 1)
    call = await client.generate(3, annotated=False)
    await worker.endpoint(ENDPOINT).unregister_endpoint_instance()
    await until(lambda: client.instance_ids() == [])
    assert await collect(call) == ["0", "1", "2"]
    await worker.endpoint(ENDPOINT).register_endpoint_instance()
    assert await client.wait_for_instances(5) == [worker.instance_id]
    assert await collect(await client.generate(1, annotated=False)) == ["0"]
    with pytest.raises(RuntimeError, match="not served by this process"):
        await worker.endpoint("dynamo.backend.other").register_endpoint_instance()


async def test_process_serves_several_endpoints(open_runtime: OpenRuntime) -> None:
    worker, caller = await open_runtime(), await open_runtime()
    for name in ("a", "b"):
        await serve(worker, Counter(name).generate, f"dynamo.backend.{name}")
    for name in ("a", "b"):
        client = await client_of(caller, 1, f"dynamo.backend.{name}")
        assert await collect(await client.generate(1, annotated=False)) == [f"{name}0"]


async def test_requests_are_spread_over_the_instances(open_runtime: OpenRuntime) -> None:
    handlers = [Counter(str(number)) for number in range(4)]
    for handler in handlers:
        await serve(await open_runtime(), handler.generate)
    client = await client_of(await open_runtime(), 4)
    for _ in range(20):
        await collect(await client.round_robin(1))
    assert [handler.started for handler in handlers] == [5, 5, 5, 5]


async def test_leaving_worker_finishes_its_requests(open_runtime: OpenRuntime) -> None:
    leaving, staying = Counter("leaving", 0.02), Counter("staying")
    first, second = await open_runtime(), await open_runtime()
    await serve(first, leaving.generate)
    client = await client_of(await open_runtime(), 1)
    call = await client.generate(20, annotated=False)
    assert await anext(call) == "leaving0"
    await serve(second, staying.generate)
    closing = asyncio.create_task(first.aclose())
    await until(lambda: client.instance_ids() == [second.instance_id])
    assert await collect(await client.generate(1, annotated=False)) == ["staying0"]
    assert len(await collect(call)) == 19
    await closing
    assert leaving.cancelled == 0


async def test_no_request_fails_while_workers_come_and_go(open_runtime: OpenRuntime) -> None:
    await serve(await open_runtime(), Counter().generate)
    client = await client_of(await open_runtime(), 1)
    answered = 0
    stop = False

    async def load() -> None:
        nonlocal answered
        while not stop:
            assert await collect(await client.round_robin(3, annotated=False)) == ["0", "1", "2"]
            answered += 1

    loads = [asyncio.create_task(load()) for _ in range(8)]
    for _ in range(5):
        coming = await open_runtime()
        await serve(coming, Counter().generate)
        while coming.instance_id not in client.instance_ids():
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        await coming.aclose()
    stop = True
    await asyncio.gather(*loads)
    assert answered > 50


async def test_left_iteration_cancels_the_handler(open_runtime: OpenRuntime) -> None:
    handler = Counter(pause_s=0.01)
    await serve(await open_runtime(), handler.generate)
    client = await client_of(await open_runtime(), 1)
    async for _ in await client.generate(1000):
        break
    await until(lambda: handler.cancelled == 1)


async def test_context_passed_on_links_the_cancellation(open_runtime: OpenRuntime) -> None:
    worker, relay, caller = await open_runtime(), await open_runtime(), await open_runtime()
    handler = Counter(pause_s=0.01)
    await serve(worker, handler.generate, "dynamo.backend.inner")
    inner = await client_of(relay, 1, "dynamo.backend.inner")

    async def forward(request: Any, context: Context) -> AsyncIterator[Any]:
        async for item in await inner.generate(request, annotated=False, context=context):
            yield item

    await serve(relay, forward, "dynamo.backend.outer")
    outer = await client_of(caller, 1, "dynamo.backend.outer")
    context = Context()
    call = await outer.generate(1000, annotated=False, context=context)
    await anext(call)
    context.kill()
    await until(lambda: handler.cancelled == 1)


async def test_context_id_and_metadata_reach_the_handler(open_runtime: OpenRuntime) -> None:
    async def who(request: Any, context: Context) -> Any:
        return [context.id(), dict(context.metadata), context.remaining_s()]

    await serve(await open_runtime(), who)
    client = await client_of(await open_runtime(), 1)
    context = Context("req-7", {"tenant": "a"}, deadline=time.monotonic() + 30)
    ((id_, metadata, remaining_s),) = await collect(await client.generate(None, False, context))
    assert (id_, metadata) == ("req-7", {"tenant": "a"})
    assert 25 < remaining_s <= 30


async def test_invalid_request_error_reaches_the_caller(open_runtime: OpenRuntime) -> None:
    from pydantic import BaseModel

    class Body(BaseModel):
        text: str

    @dynamo_endpoint(Body, str)
    async def handler(request: Body) -> AsyncIterator[str]:
        yield request.text

    await serve(await open_runtime(), handler)
    client = await client_of(await open_runtime(), 1)
    assert await collect(await client.generate({"text": "hi"}, annotated=False)) == ["hi"]
    with pytest.raises(InvalidRequest, match="text: "):
        await collect(await client.generate({"text": 1}))


async def test_unary_endpoint_answers_once(open_runtime: OpenRuntime) -> None:
    worker = await open_runtime()

    async def double(request: int, *, context: Context) -> int:
        return 2 * request

    serving = asyncio.create_task(serve_unary_endpoint(worker.endpoint(ENDPOINT), double))
    client = UnaryClient(await client_of(await open_runtime(), 1))
    assert await client.complete(21) == 42
    worker.shutdown()
    await serving


async def test_dynamo_worker_runs_and_closes(
    monkeypatch: pytest.MonkeyPatch,
    open_runtime: OpenRuntime,
    dynamo_redis_url: str,
    dynamo_redis_prefix: str,
) -> None:
    monkeypatch.setenv("DYN_REDIS_URL", dynamo_redis_url)
    monkeypatch.setenv("DYN_REDIS_PREFIX", dynamo_redis_prefix)
    client = await client_of(await open_runtime(), 0)

    @dynamo_worker()
    async def main(runtime: DistributedRuntime, greeting: str) -> str:
        serving = runtime.endpoint(ENDPOINT).serve_endpoint(Counter(greeting).generate)
        await client.wait_for_instances(5)
        assert await collect(await client.generate(1, annotated=False)) == ["hi0"]
        runtime.shutdown()
        await serving
        return greeting

    assert await main("hi") == "hi"
    await until(lambda: client.instance_ids() == [])


async def test_dynamo_worker_cancels_a_main_that_does_not_end(
    monkeypatch: pytest.MonkeyPatch, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    monkeypatch.setenv("DYN_REDIS_URL", dynamo_redis_url)
    monkeypatch.setenv("DYN_REDIS_PREFIX", dynamo_redis_prefix)
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_S", "0.05")

    @dynamo_worker()
    async def main(runtime: DistributedRuntime) -> None:
        client = await runtime.endpoint(ENDPOINT).client()
        runtime.shutdown()
        await client.wait_for_instances()

    with pytest.raises(SystemExit):
        await main()


@contextmanager
def no_log_set_up() -> Iterator[logging.Logger]:
    """A root logger without handlers; pytest's own handlers are restored afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("dynamo_redis")
    handlers, levels = root.handlers, (root.level, ours.level)
    root.handlers = []
    try:
        yield root
    finally:
        root.handlers = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


@dynamo_worker()
async def log_something(_: DistributedRuntime) -> None:
    logging.getLogger("dynamo_redis.worker").info("here")
    logging.getLogger("dynamo_redis.worker").debug("not here")


async def test_dynamo_worker_logs_by_its_settings(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dynamo_redis_url: str,
) -> None:
    monkeypatch.setenv("DYN_REDIS_URL", dynamo_redis_url)
    monkeypatch.setenv("DYN_LOG", "info")
    with no_log_set_up():
        await log_something()
    shown = capsys.readouterr().err
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:.]+Z INFO    dynamo_redis\.worker: here\n", shown)


async def test_dynamo_worker_refuses_an_unknown_log_level(
    monkeypatch: pytest.MonkeyPatch, dynamo_redis_url: str
) -> None:
    monkeypatch.setenv("DYN_REDIS_URL", dynamo_redis_url)
    monkeypatch.setenv("DYN_LOG", "bogus")
    with no_log_set_up(), pytest.raises(ConfigError, match="DYN_LOG='bogus': write one of off, error"):
        await log_something()


async def test_dynamo_worker_keeps_an_existing_log_setup(
    monkeypatch: pytest.MonkeyPatch, dynamo_redis_url: str
) -> None:
    monkeypatch.setenv("DYN_REDIS_URL", dynamo_redis_url)
    mine = logging.NullHandler()
    with no_log_set_up() as root:
        root.addHandler(mine)
        level = root.level
        await log_something()
        assert root.handlers == [mine]
        assert root.level == level


async def test_call_without_a_worker_fails_at_once(open_runtime: OpenRuntime) -> None:
    client = await client_of(await open_runtime(), 0)
    with pytest.raises(NoInstances, match="is a worker running"):
        await client.generate(1)
    with pytest.raises(NoInstances, match=r"no instance within 0\.05 s"):
        await client.wait_for_instances(0.05)


async def test_last_client_ends_the_shared_watch(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    one, other = await client_of(runtime, 0), await client_of(runtime, 0)
    await one.aclose()
    await serve(runtime, Counter().generate)
    assert await other.wait_for_instances(5) == [runtime.instance_id]
    await other.aclose()
    again = await client_of(runtime, 1)
    assert again.instance_ids() == [runtime.instance_id]


async def test_dropped_clients_leave_no_watch(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    opening = runtime.endpoint("a.b.c").client()

    async def wait_for(opening: asyncio.Task[Client]) -> None:
        await opening

    waiting = asyncio.create_task(wait_for(opening))

    def cancel(_: object, task: asyncio.Task[None] = waiting) -> None:
        task.cancel()

    opening.add_done_callback(cancel)  # in the turn of the event loop in which it is ready
    with pytest.raises(asyncio.CancelledError):
        await waiting
    del opening, waiting
    async with asyncio.timeout(30):
        while runtime._views:
            gc.collect()
            await asyncio.sleep(0.01)


async def test_calls_keep_the_watch_of_a_dropped_client(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    await serve(runtime, Counter().generate)
    client = await client_of(runtime, 1)
    call = await client.generate(1, annotated=False)
    del client
    gc.collect()
    await asyncio.sleep(0)
    assert runtime._views
    assert [item async for item in call]


async def test_unreachable_redis_is_one_clear_error() -> None:
    settings = Settings.load(redis_url="redis://user:hush@127.0.0.1:1/0", command_timeout_s=1)
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1") as caught:
        async with DistributedRuntime(settings=settings):
            pass
    assert "hush" not in str(caught.value)


async def test_runtime_may_be_started_again_after_a_failure(own_redis_server: EmbeddedServer) -> None:
    await own_redis_server.stop()
    runtime = DistributedRuntime(settings=Settings.load(redis_url=own_redis_server.url))
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await runtime.start()
    await own_redis_server.start()
    await runtime.start()
    await serve(runtime, Counter().generate)
    await runtime.aclose()


def test_unknown_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="colour"):
        Settings.load(colour="red")


async def test_foreign_discovery_backend_is_accepted(
    dynamo_redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings.load(redis_url=dynamo_redis_url)
    with caplog.at_level(logging.INFO):
        runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", "tcp", settings=settings)
    assert "discovery here is Redis" in caplog.text
    await runtime.aclose()


async def test_expired_worker_finishes_its_answer(open_runtime: OpenRuntime) -> None:
    """A worker that lost Redis, and with it its lease, still has connections to callers."""
    worker = await open_runtime(lease_ttl_s=1)
    await serve(worker, Counter(pause_s=0.02).generate)
    client = await client_of(await open_runtime(), 1)
    call = await client.generate(100, annotated=False)
    assert await anext(call) == "0"
    keepalive = worker.registry._keepalive  # type: ignore[attr-defined]
    await keepalive.aclose()
    await until(lambda: client.instance_ids() == [])
    assert len(await collect(call)) == 99


async def test_shutdown_waits_once_for_a_silent_redis(
    open_runtime: OpenRuntime, own_redis_server: EmbeddedServer
) -> None:
    worker = await open_runtime(redis_url=own_redis_server.url, command_timeout_s=0.5)
    for number in range(24):
        await worker.endpoint(f"test.silent.n{number}").start_serving(Counter().generate)
    own_redis_server.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        await worker.aclose()
        assert time.monotonic() - began < 8
    finally:
        own_redis_server.send_signal(signal.SIGCONT)


async def test_record_is_deleted_when_a_silent_redis_is_back(
    open_runtime: OpenRuntime, own_redis_server: EmbeddedServer
) -> None:
    """A leaving worker is not chosen while it drains, though Redis did not answer at first."""
    worker, other = [
        await open_runtime(redis_url=own_redis_server.url, command_timeout_s=0.5) for _ in range(2)
    ]
    for number in range(3):
        await worker.endpoint(f"test.silent.n{number}").start_serving(Counter().generate)
    own_redis_server.send_signal(signal.SIGSTOP)
    try:
        await worker.leave()
    finally:
        own_redis_server.send_signal(signal.SIGCONT)
    async with asyncio.timeout(30):
        while (await other.registry.get_prefix("v1/instances/test/silent/")).records:
            await asyncio.sleep(0.02)


async def test_cancelled_delete_is_sent_nevertheless(
    open_runtime: OpenRuntime,
) -> None:
    runtime = await open_runtime()
    registration = await runtime.registry.register("test/key", b"value")
    writing = runtime.registry._registrations._serial  # type: ignore[attr-defined]
    async with writing:
        leaving = asyncio.create_task(registration.unregister())
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
    async with asyncio.timeout(30):
        while await runtime.registry.get("test/key") is not None:
            await asyncio.sleep(0.01)
