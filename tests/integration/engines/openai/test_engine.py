"""An OpenAI-compatible server as an engine: over real HTTP, with a small engine in the test."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

import pytest

from dynamo_redis.config import OpenAIEngineSettings
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.load_reports import kv_metrics
from dynamo_redis.engines.openai.engine import OpenAIEngine
from dynamo_redis.engines.openai.http import EngineHttp
from dynamo_redis.errors import (
    ConfigError,
    ConnectionLost,
    Draining,
    HandlerFailed,
    InvalidRequest,
    Overloaded,
    PlaneError,
)
from dynamo_redis.events.block_hashes import chain, local_hashes
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context
from dynamo_redis.router.base import Worker
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.load_metrics import LoadMetrics
from dynamo_redis.store.streams.memory import MemoryEventStreams
from dynamo_redis.wire.event import EventBatch, PublisherId
from tests.integration.engines.kv_event_server import neighbouring_ports
from tests.integration.engines.openai_engine import MODEL_NAME, TestEngine, restarted, running_engine

PROMPT = list(range(100, 164))
NO_REQUEST: Any = "no request"


def request(max_tokens: int = 20, **more: Any) -> GenerateRequest:
    body = {
        "model": "demo",
        "token_ids": PROMPT,
        "stop_conditions": {"max_tokens": max_tokens, "ignore_eos": True},
        "sampling_options": {"temperature": 0.5, "seed": 7},
        "eos_token_ids": [2],
    }
    return cast("GenerateRequest", body | more)


@asynccontextmanager
async def engine_at(
    server: TestEngine, *, context_length: int | None = None, **settings: Any
) -> AsyncIterator[OpenAIEngine]:
    defaults: dict[str, Any] = {"engine_url": server.url, "engine_poll_interval_s": 0.02}
    engine = OpenAIEngine(
        OpenAIEngineSettings(**defaults | settings),
        read_model_directory(DEMO_MODEL_PATH),
        context_length=context_length,
    )
    try:
        await engine.start()
        yield engine
    finally:
        await engine.aclose()


async def answer(engine: Any, wanted: GenerateRequest, context: Context | None = None) -> list[GenerateItem]:
    async with aclosing(engine.generate(wanted, context or Context())) as items:
        return [item async for item in items]


def token_ids(items: list[GenerateItem]) -> list[int]:
    return [token for item in items for token in item["token_ids"]]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_tokens_are_sent_and_received_unchanged() -> None:
    async with running_engine() as server, engine_at(server) as engine:
        items = await answer(engine, request())
        assert token_ids(items) == token_ids(await answer(server.mock, request()))
        assert len(items) > 5  # as tokens are made, not at the end
        assert items[-1]["finish_reason"] == "length"
        assert items[-1]["cached_tokens"] == 0
        sent = server.requests[0]
        assert sent["prompt"] == PROMPT
        assert sent["model"] == MODEL_NAME
        assert (sent["max_tokens"], sent["ignore_eos"], sent["seed"], sent["temperature"]) == (
            20,
            True,
            7,
            0.5,
        )
        again = await answer(engine, request())
        assert again[-1]["cached_tokens"] == len(PROMPT) - 16  # the last block is computed in any case


@pytest.mark.parametrize("given", [None, f"00-{'1' * 32}-{'2' * 16}-01", "no\r\ntrace: context"])
async def test_engine_gets_the_trace_of_its_request(given: str | None) -> None:
    async with running_engine() as server, engine_at(server) as engine:
        await answer(engine, request(), Context("mine", traceparent=given))
        headers = {name.lower(): value for name, value in server.headers[-1].items()}
        assert headers["x-request-id"] == "mine"
        assert headers.get("traceparent") == (given if given and given.isprintable() else None)


async def test_capacity_and_load_are_read_from_the_engine() -> None:
    async with running_engine(total_kv_blocks=321, block_size=32, speedup_ratio=1) as server:
        async with engine_at(server) as engine:
            assert (engine.capacity.kv_block_size, engine.capacity.total_kv_blocks) == (32, 321)
            running = asyncio.create_task(answer(engine, request(2000)))
            await until(lambda: engine.loads()[0].running_count == 1)
            await until(lambda: (engine.loads()[0].active_blocks or 0) >= 3)
            running.cancel()
            await asyncio.wait([running])
            await until(lambda: engine.loads()[0].running_count == 0)
        async with engine_at(server, engine_block_size=8, engine_total_kv_blocks=5) as engine:
            assert (engine.capacity.kv_block_size, engine.capacity.total_kv_blocks) == (8, 5)


@pytest.mark.parametrize("owner", ["sglang", "llamacpp", "another"])
async def test_text_answer_becomes_tokens_of_that_text(owner: str) -> None:
    async with running_engine(owner=owner) as server, engine_at(server) as engine:
        wanted = request(stop_conditions={"max_tokens": 150})
        made = token_ids(await answer(server.mock, wanted))
        items = await answer(engine, wanted)
        assert server.tokenizer.decode(token_ids(items)) == server.tokenizer.decode(made)
        assert not server.tokenizer.decode(made).isascii()
        assert items[-1]["finish_reason"] == (await answer(server.mock, wanted))[-1]["finish_reason"]


async def test_server_that_takes_no_ids_gets_text() -> None:
    async with running_engine(owner="another", takes_ids=False) as server, engine_at(server) as engine:
        prompt = server.tokenizer.encode("<|im_start|>user\nWho waits at the café?").ids
        wanted = request(token_ids=prompt, stop_conditions={"max_tokens": 20})
        made = token_ids(await answer(server.mock, wanted))
        for _ in range(2):
            items = await answer(engine, wanted)
            assert server.tokenizer.decode(token_ids(items)) == server.tokenizer.decode(made)
        kinds = [type(body["prompt"]) for body in server.requests]
        assert kinds == [list, str, str]
        unknown_to_openai = {"ignore_eos", "min_tokens", "top_k", "return_token_ids", "cache_prompt"}
        assert not unknown_to_openai & server.requests[0].keys()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, InvalidRequest),
        (413, InvalidRequest),
        (429, Overloaded),
        (503, Overloaded),
        (500, HandlerFailed),
        (502, HandlerFailed),
    ],
)
async def test_refusals_of_the_engine_have_typed_errors(status: int, error: type[PlaneError]) -> None:
    async with running_engine() as server, engine_at(server) as engine:
        server.fail_with = (status, {"Retry-After": "3"})
        with pytest.raises(error, match="as told") as caught:
            await answer(engine, request())
        if isinstance(caught.value, Overloaded):
            assert caught.value.retry_after_s == 3
        server.fail_with = None
        assert await answer(engine, request())


async def test_invalid_prompt_never_reaches_the_engine() -> None:
    async with running_engine() as server, engine_at(server) as engine:
        for wrong in (None, [], "text", [1, "2"], [1.5]):
            with pytest.raises(InvalidRequest):
                await answer(engine, request(token_ids=wrong))
        with pytest.raises(InvalidRequest):
            await answer(engine, NO_REQUEST)
        assert not server.requests


async def test_cancelled_request_ends_in_the_engine_at_once() -> None:
    async with running_engine(speedup_ratio=1) as server, engine_at(server) as engine:
        context = Context()
        items = []
        async with aclosing(engine.generate(request(5000), context)) as stream:
            async for item in stream:
                items.append(item)
                if len(items) == 2:
                    context.stop_generating()
        assert items[-1] == {"token_ids": [], "finish_reason": "cancelled"}
        await until(lambda: not server.mock.running_count and server.cancelled_count)
        assert server.cancelled_count == 1


async def test_request_is_cancelled_before_the_engine_answers() -> None:
    async with running_engine(speedup_ratio=0.001) as server, engine_at(server) as engine:
        context = Context()
        answering = asyncio.create_task(answer(engine, request(), context))
        await until(lambda: server.mock.running_count)
        context.kill()
        assert (await answering)[-1]["finish_reason"] == "cancelled"
        await until(lambda: not server.mock.running_count)


async def test_left_answer_ends_in_the_engine() -> None:
    async with running_engine(speedup_ratio=1) as server, engine_at(server) as engine:
        async with aclosing(engine.generate(request(5000), Context())) as stream:
            await anext(stream)
        await until(lambda: not server.mock.running_count)


async def test_answer_that_breaks_off_is_a_lost_connection() -> None:
    async with running_engine() as server, engine_at(server) as engine:
        server.break_off_after = 3
        with pytest.raises(ConnectionLost):
            await answer(engine, request())


async def test_health_follows_the_engine() -> None:
    async with running_engine() as server, engine_at(server) as engine:
        await asyncio.wait_for(engine.wait_health(True), 20)
        server.fail_with = (503, {})
        await asyncio.wait_for(engine.wait_health(False), 20)
        server.fail_with = None
        await asyncio.wait_for(engine.wait_health(True), 20)
        async with restarted(server):
            await asyncio.wait_for(engine.wait_health(True), 20)
            assert await answer(engine, request())


async def test_refused_connection_is_retryable_and_marks_it_down() -> None:
    async with running_engine() as server, engine_at(server, engine_poll_interval_s=60) as engine:
        await server.stop()
        with pytest.raises((Draining, ConnectionLost)) as caught:
            await answer(engine, request())
        assert caught.value.retryable
        await asyncio.wait_for(engine.wait_health(False), 20)


async def test_engine_that_never_starts_is_named_in_the_error() -> None:
    async with running_engine() as server:
        url = server.url
    settings = OpenAIEngineSettings(engine_url=url, engine_start_timeout_s=0.05, engine_poll_interval_s=0.01)
    engine = OpenAIEngine(settings, read_model_directory(DEMO_MODEL_PATH))
    with pytest.raises(ConfigError, match="DYN_ENGINE_START_TIMEOUT_S"):
        await engine.start()
    await engine.aclose()


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine_url": "redis://host"},
        {"engine_url": "127.0.0.1:8001"},
        {"kv_replay_endpoint": "tcp://127.0.0.1:1"},
    ],
)
def test_contradicting_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OpenAIEngine(OpenAIEngineSettings(**wrong), read_model_directory(DEMO_MODEL_PATH))


async def test_request_goes_to_the_chosen_rank() -> None:
    async with running_engine() as server, engine_at(server, engine_data_parallel_size=2) as engine:
        await answer(engine, request(dp_rank=0))
        assert server.headers[0]["X-data-parallel-rank"] == "0"
        await answer(engine, request())
        assert "X-data-parallel-rank" not in server.headers[1]
        with pytest.raises(InvalidRequest):
            await answer(engine, request(dp_rank=2))


async def test_relayed_blocks_are_the_engines_blocks() -> None:
    """They stay equal through evictions, a cleared cache, and another engine in its place."""
    async with running_engine(total_kv_blocks=24, block_size=4) as server, following(server) as pair:
        engine, publisher = pair
        for first in range(0, 400, 40):
            await answer(engine, request(token_ids=list(range(first, first + 50)), max_tokens=5))
        held = server.mock.cache.stored
        await until(lambda: held() and set(publisher.blocks()) == held())
        assert await engine.clear_kv_blocks() > 0
        await until(lambda: not publisher.block_count and not held())
        await answer(engine, request())
        await until(lambda: held() and set(publisher.blocks()) == held())
        async with restarted(server, total_kv_blocks=24, block_size=4) as another:
            await asyncio.wait_for(engine.wait_health(True), 20)
            await answer(engine, request(token_ids=list(range(50))))
            truth = another.mock.cache.stored
            await until(lambda: truth() and set(publisher.blocks()) == truth())


@asynccontextmanager
async def following(
    server: TestEngine, *, replay: bool = True, **settings: Any
) -> AsyncIterator[tuple[OpenAIEngine, KvPublisher]]:
    """Run an engine whose KV events are relayed to that publisher."""
    events, publisher = server.events[0], KvPublisher(None, block_size=4)
    replay_endpoint = events.replay_endpoint if replay else None
    async with engine_at(
        server, kv_events_endpoint=events.endpoint, kv_replay_endpoint=replay_endpoint, **settings
    ) as engine:
        engine.follow([publisher])
        yield engine, publisher


async def test_cache_of_an_ended_engine_is_forgotten_at_once() -> None:
    """Without a replay socket only the first message after its next start would show it."""
    async with running_engine(block_size=4) as server, following(server, replay=False) as pair:
        engine, publisher = pair
        async with asyncio.timeout(20):
            while not publisher.block_count:  # the subscription takes effect some time after it was made
                await engine.clear_kv_blocks()
                await answer(engine, request())
        await server.stop()
        await until(lambda: not publisher.block_count)


async def test_prompts_are_sent_as_text_where_set() -> None:
    async with running_engine() as server, engine_at(server, engine_prompt="text") as engine:
        prompt = server.tokenizer.encode("<|im_start|>user").ids
        await answer(engine, request(token_ids=prompt))
        assert server.requests[0]["prompt"] == "<|im_start|>user"


async def test_each_rank_reports_its_own_cache() -> None:
    server = TestEngine(block_size=4, data_parallel_size=2)
    try:
        await server.start(event_port=neighbouring_ports()[0])
        settings: dict[str, Any] = {
            "engine_data_parallel_size": 2,
            "kv_events_endpoint": server.events[0].endpoint,
        }
        async with engine_at(server, **settings) as engine:
            publishers = [KvPublisher(None, block_size=4, dp_rank=rank) for rank in range(2)]
            engine.follow(publishers)
            caches = [rank.cache for rank in server.mock.ranks]
            async with asyncio.timeout(20):
                while not all(publisher.block_count for publisher in publishers):
                    await engine.clear_kv_blocks()  # blocks stored before the subscription took effect
                    for rank in range(2):
                        await answer(engine, request(token_ids=list(range(30 + rank)), dp_rank=rank))
            await until(
                lambda: (
                    [set(publisher.blocks()) for publisher in publishers]
                    == [cache.stored() for cache in caches]
                )
            )
            await until(lambda: len(engine.loads()) == 2)
    finally:
        await server.stop()


@pytest.mark.parametrize("clear", [False, True])
async def test_warm_engine_without_replay_becomes_known(clear: bool) -> None:
    """Its new blocks follow blocks without events, which prompts show; or its cache is cleared."""
    prefix = list(range(64))
    async with running_engine(block_size=4) as server:
        for number in range(3):
            await answer(server.mock, request(token_ids=[*prefix, number]))
        async with following(server, replay=False, kv_events_clear=clear) as (engine, publisher):
            prompt = prefix
            async with asyncio.timeout(20):
                while not set(publisher.blocks()) >= set(chain(local_hashes(prompt, 4))):
                    prompt = [*prefix, *random.choices(range(100, 1000), k=20)]
                    await answer(engine, request(token_ids=prompt))
                    await asyncio.sleep(0.02)
            held = server.mock.cache.stored
            # A cache that was just cleared is empty before its event has arrived.
            await until(lambda: set(publisher.blocks()) <= held())
            if clear:
                await until(lambda: set(publisher.blocks()) == held())
                await until(lambda: engine.relay is not None and not engine.relay.partial)


async def test_frozen_engine_fails_its_unanswered_requests() -> None:
    async with running_engine(speedup_ratio=0.001) as server, engine_at(server) as engine:
        waiting = asyncio.create_task(answer(engine, request()))
        await until(lambda: server.mock.running_count)
        server.fail_with = (500, {})
        with pytest.raises(Draining):
            await asyncio.wait_for(waiting, 20)


async def test_model_that_the_engine_lacks_is_refused() -> None:
    async with running_engine() as server:
        with pytest.raises(ConfigError, match=MODEL_NAME):
            async with engine_at(server, engine_model="another"):
                pass


@pytest.mark.parametrize("says_use", [True, False])
async def test_unknown_use_removes_no_booking(says_use: bool) -> None:
    """Without the engine's cache usage a router uses its own bookings."""
    async with running_engine() as server:
        server.says_use = says_use
        async with engine_at(server) as engine:
            [load] = engine.loads()
    book, worker = LoadBook(), Worker(7)
    book.add("router", "1", worker, prefill_tokens=0, blocks=500, deadline=1e12)
    metrics = LoadMetrics(MemoryEventStreams(), "dynamo", "backend", book, on_change=lambda: None)
    metrics.apply(EventBatch("kv_metrics", PublisherId(7, 1, 0), 0, 0, [kv_metrics(load, 8)]).to_bytes())
    assert book.load(worker).blocks == (0 if says_use else 500)


@pytest.mark.parametrize("way", ["stays open", "breaks off", "closes"])
async def test_answer_ends_with_done(way: str) -> None:
    """After `[DONE]` a server may keep the connection open, or break it without an end."""
    event = b'data: {"choices": [{"text": "hi", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))
        await writer.drain()
        if way == "stays open":
            await over.wait()
        elif way == "breaks off":
            writer.transport.abort()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    http = EngineHttp(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None, 20)
    completion = http.complete({"prompt": "x"}, {})
    try:
        async with asyncio.timeout(20):
            events = [data async for arrived in completion.events() for data in arrived]
        assert len(events) == 2
    finally:
        over.set()
        completion.close()
        await http.aclose()
        server.close()
