"""An engine is identified at the start, when it comes back, and when it seems to be another one."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing

import pytest
from aiohttp import web

from dynamo_redis.engines.openai.http import EngineHttp
from dynamo_redis.errors import ConfigError, ConnectionLost, ContextLengthExceeded, EngineFailed
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.planes.context import Context
from tests.integration.engines.openai.test_engine import PROMPT, answer, engine_at, request, until
from tests.integration.engines.openai_engine import restarted, running_engine

NO_LIMIT = {"ignore_eos": True}


async def test_engines_own_context_and_block_size_are_used() -> None:
    async with running_engine(block_size=32, max_model_len=2048) as server:
        async with engine_at(server) as engine:
            assert engine.capacity.context_length == 2048
            assert engine.capacity.kv_block_size == 32
        server.max_model_len = None
        async with engine_at(server) as engine:
            assert engine.capacity.context_length is None


async def test_settings_that_contradict_the_engine_are_named(caplog: pytest.LogCaptureFixture) -> None:
    async with running_engine(block_size=32, max_model_len=2048) as server:
        async with engine_at(server, engine_block_size=16, context_length=4096) as engine:
            assert engine.capacity.context_length == 2048
            assert "DYN_ENGINE_BLOCK_SIZE=16" in caplog.text
            assert "DYN_CONTEXT_LENGTH=4096" in caplog.text
        async with engine_at(server, context_length=1024) as engine:
            assert engine.capacity.context_length == 1024


async def test_unset_limit_is_the_rest_of_the_context() -> None:
    async with running_engine(max_model_len=100) as server, engine_at(server) as engine:
        items = await answer(engine, request(stop_conditions=NO_LIMIT))
        assert items[-1]["finish_reason"] == "length"
        assert server.requests[0]["max_tokens"] == 100 - len(PROMPT)
    async with running_engine(owner="another") as server, engine_at(server) as engine:
        await answer(engine, request(stop_conditions={"min_tokens": 0}))
        assert "max_tokens" not in server.requests[0]


async def test_worker_waits_for_models_listed_late(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running_engine() as server:
        server.name = None

        async def ask() -> None:
            async with engine_at(server) as engine:
                assert await answer(engine, request())

        asking = asyncio.create_task(ask())
        await until(lambda: "lists no models" in caplog.text)
        server.name = "a-model-at-last"
        await asking
        assert server.requests[0]["model"] == "a-model-at-last"


async def test_models_never_listed_are_named_in_the_error() -> None:
    async with running_engine() as server:
        server.name = None
        with pytest.raises(ConfigError, match="lists no models"):
            async with engine_at(server, engine_start_timeout_s=0.2):
                pass


async def test_restarted_engine_is_identified_again(caplog: pytest.LogCaptureFixture) -> None:
    async with running_engine(max_model_len=2048) as server, engine_at(server) as engine:
        publisher = KvPublisher(None, block_size=16)
        engine.follow([publisher])
        await server.stop()
        await asyncio.wait_for(engine.wait_health(False), 20)
        async with restarted(server, name="another", block_size=64, max_model_len=512):
            await asyncio.wait_for(engine.wait_health(True), 20)
            assert engine.capacity.context_length == 512
            assert engine.capacity.kv_block_size == 64
            assert publisher.block_size == 64
            assert await answer(engine, request())
            assert "model another, context 512, blocks of 64 tokens; it was" in caplog.text


async def test_sizes_stay_while_metrics_lack_them() -> None:
    async with running_engine(block_size=32) as server, engine_at(server) as engine:
        publisher = KvPublisher(None, block_size=32)
        engine.follow([publisher])
        known = engine.capacity
        server.says_sizes = False
        seen_count = server.measured_count + 2
        await until(lambda: server.measured_count > seen_count)
        assert engine.capacity == known
        assert not publisher.left_out


async def test_load_becomes_unknown_when_it_cannot_be_read() -> None:
    """The last load is published repeatedly, and routers would take it for the present load."""
    async with (
        running_engine(data_parallel_size=2) as server,
        engine_at(server, engine_data_parallel_size=2) as engine,
    ):
        await until(lambda: [load.active_blocks for load in engine.loads()] == [0, 0])
        server.measures = False
        await until(lambda: [load.active_blocks for load in engine.loads()] == [None])
        server.measures = True
        await until(lambda: [load.active_blocks for load in engine.loads()] == [0, 0])


async def test_engine_renamed_between_two_checks_answers() -> None:
    async with running_engine() as server, engine_at(server, engine_poll_interval_s=600) as engine:
        server.name = "renamed"
        assert (await answer(engine, request()))[-1]["finish_reason"] == "length"
        assert [sent["model"] for sent in server.requests][1:] == ["renamed"]


async def test_begun_answer_is_not_requested_again() -> None:
    """Nor if the engine aborts the answer with a 404 and has another name then."""
    async with running_engine() as server, engine_at(server, engine_poll_interval_s=600) as engine:
        server.give_up_as = "renamed"
        async with aclosing(engine.generate(request(), Context())) as items:
            assert (await anext(items))["token_ids"]
            with pytest.raises(EngineFailed):
                await anext(items)
        assert len(server.requests) == 1


async def test_engine_without_the_model_is_down_until_it_has_it() -> None:
    async with running_engine(name="wanted") as server, engine_at(server, engine_model="wanted") as engine:
        await server.stop()
        await asyncio.wait_for(engine.wait_health(False), 20)
        async with restarted(server, name="other") as another:
            await until(lambda: "wanted" in engine._server.problem)
            another.name = "wanted"
            await asyncio.wait_for(engine.wait_health(True), 20)
            assert await answer(engine, request())


async def test_context_overflow_has_its_own_error() -> None:
    async with running_engine() as server, engine_at(server) as engine:
        server.refuse_with = (400, "This model's maximum context length is 8 tokens")
        with pytest.raises(ContextLengthExceeded, match="8 tokens"):
            await answer(engine, request())


async def test_health_path_can_be_set() -> None:
    async with running_engine() as server:
        server.fail_with = (503, {})
        async with engine_at(server, engine_health_path="/v1/models") as engine:
            await asyncio.wait_for(engine.wait_health(True), 20)


async def test_answers_are_read_to_their_end() -> None:
    """They arrive in more pieces than the client's buffer holds."""
    whole = b"x" * 600_000

    async def slowly(http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
        await response.prepare(http)
        end = int(http.query["end"])
        for first in range(0, end, 50_000):
            await response.write(whole[first : min(end, first + 50_000)])
            await asyncio.sleep(0.001)
        assert http.transport is not None
        if end < len(whole):
            http.transport.abort()
        return response

    app = web.Application()
    app.add_routes([web.get("/metrics", slowly)])
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    http = EngineHttp(f"http://127.0.0.1:{runner.addresses[0][1]}", None, 3.0)
    try:
        assert await http.ask("GET", f"/metrics?end={len(whole)}", 20) == (200, whole)
        with pytest.raises(ConnectionLost):
            await http.ask("GET", "/metrics?end=200000", 20)
    finally:
        await http.aclose()
        await runner.cleanup()


async def test_healthy_engine_stays_up_while_it_lists_no_model() -> None:
    async with running_engine() as server, engine_at(server) as engine:
        server.name, name = None, server.name
        engine._server.expire_identity()
        seen = server.listed_count
        await until(lambda: server.listed_count > seen + 5)
        server.name = name
        assert engine._server.up.is_set()
        assert await answer(engine, request())
