"""A worker on a real Redis: its registrations, their order, and its callers' results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import pytest
from tokenizers import Tokenizer

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.mock.engine import MockEngine
from dynamo_redis.engines.worker import serve_engine
from dynamo_redis.errors import InvalidRequest, ModelError, Overloaded
from dynamo_redis.models.card import ModelCard
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.models.download import fetch_model_files
from dynamo_redis.names import INSTANCES, MODEL_CARDS
from dynamo_redis.runtime import Context, DistributedRuntime
from dynamo_redis.store.base import Delete, DeleteCause, Put, Registry
from dynamo_redis.store.server import EmbeddedServer

ENDPOINT = "dynamo.backend.generate"


class MockWorker(Protocol):
    runtime: DistributedRuntime
    engine: MockEngine
    serving: asyncio.Task[None]

    async def stop(self) -> None: ...


class Deployment(Protocol):
    """The `deployment` fixture."""

    def runtime(self) -> AbstractAsyncContextManager[DistributedRuntime]: ...
    def worker(self, *, model_name: str = ..., **engine: Any) -> AbstractAsyncContextManager[MockWorker]: ...


Deploy = Callable[[str, str], Deployment]


def _request(prompt: list[int], **stop: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "token_ids": prompt,
        "stop_conditions": stop,
        "sampling_options": {},
        "eos_token_ids": [2],
    }


async def _only_card(registry: Registry) -> ModelCard:
    records = (await registry.get_prefix(MODEL_CARDS)).records
    assert len(records) == 1
    return ModelCard.from_bytes(records[0].value)


async def _until(condition: Callable[[], bool], within_s: float = 5) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_caller_without_any_file_gets_readable_text(deployment: Deployment, tmp_path: Path) -> None:
    async with deployment.worker() as worker, deployment.runtime() as runtime:
        card = await _only_card(runtime.registry)
        assert (card.display_name, card.kv_cache_block_size) == ("demo", 16)
        assert card.runtime_config.total_kv_blocks == worker.engine.capacity.total_kv_blocks

        model = read_model_directory(await fetch_model_files(runtime.objects, card, tmp_path))
        tokenizer = Tokenizer.from_buffer(model.read_tokenizer())
        client = await runtime.endpoint(ENDPOINT).client()
        request = _request(tokenizer.encode("Tell me something.").ids)
        items = [item async for item in await client.round_robin(request, annotated=False)]

    assert items[0]["cached_tokens"] == 0
    assert items[-1]["finish_reason"] == "stop"
    text = tokenizer.decode([token for item in items for token in item["token_ids"]])
    assert text[0].isupper()
    assert text.endswith(".")


async def test_card_is_registered_last_and_withdrawn_first(deployment: Deployment) -> None:
    """The endpoints for routers are there before `generate`; the card is last in and first out."""
    beside = ["kv_dump", "clear_kv_blocks", "load_metrics"]
    async with deployment.runtime() as runtime, runtime.registry.watch("v1/") as watch:
        assert (await anext(watch)).events == ()
        put: list[str] = []
        deleted: list[str] = []

        def part(key: str) -> str:
            _, kind, _, _, endpoint, *_ = key.split("/")
            return "card" if kind == "mdc" else endpoint

        def note(events: tuple[Put | Delete, ...]) -> None:
            for event in events:
                if isinstance(event, Put):
                    put.append(part(event.record.key))
                else:
                    assert event.cause is DeleteCause.DELETED
                    deleted.append(part(event.key))

        async with deployment.worker() as worker:
            while len(put) < 5:
                note((await anext(watch)).events)
            assert len(await runtime.objects.list("models")) == 4
            await worker.stop()
        while len(deleted) < 5:
            note((await anext(watch)).events)
    assert put == [*beside, "generate", "card"]
    assert (deleted[0], set(deleted)) == ("card", set(put))


async def test_request_under_way_finishes_at_shutdown(deployment: Deployment) -> None:
    async with (
        deployment.worker(speedup_ratio=1, decode_step_s=0.01) as worker,
        deployment.runtime() as runtime,
    ):
        client = await runtime.endpoint(ENDPOINT).client()
        answer = await client.round_robin(
            _request([1, 2, 3], max_tokens=50, ignore_eos=True), annotated=False
        )
        items = [await anext(answer)]
        stopping = asyncio.create_task(worker.stop())
        items += [item async for item in answer]
        await stopping
    assert len(items) == 50
    assert items[-1]["finish_reason"] == "length"


async def test_caller_that_disconnects_frees_the_engine(deployment: Deployment) -> None:
    async with (
        deployment.worker(speedup_ratio=1, decode_step_s=0.005) as worker,
        deployment.runtime() as runtime,
    ):
        client = await runtime.endpoint(ENDPOINT).client()
        answer: Any = await client.round_robin(_request([1] * 40, ignore_eos=True), annotated=False)
        await anext(answer)
        assert worker.engine.running_count == 1
        await answer.aclose()
        await _until(lambda: worker.engine.running_count == 0)
        assert worker.engine.cache.active_count == 0


async def test_stopped_request_ends_in_the_engine(deployment: Deployment) -> None:
    async with (
        deployment.worker(speedup_ratio=1, decode_step_s=0.005) as worker,
        deployment.runtime() as runtime,
    ):
        client = await runtime.endpoint(ENDPOINT).client()
        context = Context()
        answer = await client.round_robin(
            _request([1] * 40, ignore_eos=True), annotated=False, context=context
        )
        await anext(answer)
        context.stop_generating()
        assert [item async for item in answer] == []
        await _until(lambda: worker.engine.running_count == 0)


async def test_refusals_of_the_engine_reach_the_caller(deployment: Deployment) -> None:
    async with (
        deployment.worker(speedup_ratio=1, decode_step_s=60, max_num_seqs=1, max_num_waiting=0) as worker,
        deployment.runtime() as runtime,
    ):
        client = await runtime.endpoint(ENDPOINT).client()
        with pytest.raises(InvalidRequest, match="token_ids"):
            async for _ in await client.round_robin(_request([]), annotated=False):
                pass
        first = await client.round_robin(_request([1]), annotated=False)
        waiting = asyncio.ensure_future(anext(first))
        await _until(lambda: worker.engine.running_count == 1)
        with pytest.raises(Overloaded):
            async for _ in await client.round_robin(_request([2]), annotated=False):
                pass
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_two_workers_share_their_files(deployment: Deployment) -> None:
    async with deployment.worker(), deployment.worker(), deployment.runtime() as runtime:
        assert len((await runtime.registry.get_prefix(MODEL_CARDS)).records) == 2
        assert len(await runtime.objects.list("models")) == 4


async def test_engine_that_cannot_start_leaves_no_record(deployment: Deployment, tmp_path: Path) -> None:
    model = read_model_directory(DEMO_MODEL_PATH)
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"model": {}}')
    for file in model.files.values():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read())
    model = read_model_directory(tmp_path)
    async with deployment.runtime() as runtime:
        engine = MockEngine(MockEngineSettings(), model)
        with pytest.raises(ModelError, match="not a usable tokenizer"):
            await serve_engine(runtime, engine, model, endpoint=ENDPOINT, model_name="demo")
        assert (await runtime.registry.get_prefix("v1/")).records == ()


async def test_model_that_cannot_be_published_leaves_no_record(
    deployment: Deployment, tmp_path: Path
) -> None:
    model = read_model_directory(DEMO_MODEL_PATH)
    for file in model.files.values():
        (tmp_path / file.name).write_bytes(file.read())
    model = read_model_directory(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    async with deployment.runtime() as runtime:
        engine = MockEngine(MockEngineSettings(), model)
        with pytest.raises(ModelError, match="has changed"):
            await serve_engine(runtime, engine, model, endpoint=ENDPOINT, model_name="demo")
        assert (await runtime.registry.get_prefix("v1/")).records == ()


async def test_emptied_redis_gets_files_instance_and_card_back(
    deploy: Deploy, own_redis_server: EmbeddedServer, tmp_path: Path
) -> None:
    deployment = deploy(own_redis_server.url, "wiped")
    async with deployment.worker(), deployment.runtime() as runtime:
        await own_redis_server.kill()
        own_redis_server.erase()
        await own_redis_server.start()
        async with asyncio.timeout(20), runtime.registry.watch(MODEL_CARDS) as watch:
            async for batch in watch:
                if any(isinstance(event, Put) for event in batch.events):
                    break
            # The card is there: so must be all that it needs.
            assert len((await runtime.registry.get_prefix(INSTANCES)).records) == 4
            await fetch_model_files(runtime.objects, await _only_card(runtime.registry), tmp_path / "cache")
