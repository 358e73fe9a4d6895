"""Requests go where their prefix is: workers with the mock engine, frontends with the router inside."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from dynamo_redis.config import RouterSettings
from dynamo_redis.errors import PlaneError
from dynamo_redis.planes.context import Context
from dynamo_redis.router.asking import ask_best_worker, ask_states
from dynamo_redis.router.kv_router import KvRouter
from tests.routed_deployment import WORKERS, Deployment, until, until_served

STORY = "Once upon a time there was a router that knew what every worker had read before. " * 8
PROMPT = list(range(2, 162))  # ten blocks


async def complete(frontend: httpx.AsyncClient, prompt: str | list[int], **fields: Any) -> dict[str, Any]:
    response = await frontend.post(
        "/v1/completions", json={"model": "demo", "prompt": prompt, "max_tokens": 4, **fields}
    )
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def cached_tokens(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def ask(router: KvRouter, *, max_tokens: int = 4, **more: Any) -> Any:
    request = {
        "model": "demo",
        "token_ids": PROMPT,
        "stop_conditions": {"max_tokens": max_tokens, "ignore_eos": True},
        "sampling_options": {},
        "eos_token_ids": [],
    }
    return router.generate(request, False, Context(), **more)


def knows(router: KvRouter, *, blocks: int = 10) -> bool:
    assert router.indexer is not None
    return sum(router.indexer.index.block_counts().values()) >= blocks


async def test_blind_choices_are_counted(deployment: Deployment) -> None:
    worker = await deployment.worker()
    router, _ = await deployment.router()
    assert router.indexer is not None
    async with await ask(router) as call:
        assert [item async for item in call]
    assert (router.counts.request_count, router.counts.blind_count) == (1, 0)
    router.indexer._ledger.lose(worker.instance_id)  # as after an ask without an answer
    async with await ask(router) as call:
        assert [item async for item in call]
    assert (router.counts.request_count, router.counts.blind_count) == (2, 1)


async def test_prefix_is_read_by_one_worker_only(deployment: Deployment) -> None:
    workers = [await deployment.worker() for _ in range(2)]
    frontend = await deployment.frontend()
    await until_served(frontend, instances=2)
    first = await complete(frontend, STORY)
    assert cached_tokens(first) == 0
    looking = await deployment.open_runtime()

    async def known_blocks() -> int:
        [answer] = await ask_states(looking)
        assert answer.state is not None
        return int(answer.state["index"]["block_count"])

    while not await known_blocks():
        await asyncio.sleep(0.01)
    holder = next(worker for worker in workers if worker.engine.request_count)
    for count in (2, 3):
        again = await complete(frontend, STORY + "And then?")
        assert holder.engine.request_count == count
        assert cached_tokens(again) >= first["usage"]["prompt_tokens"] // 16 * 16
    [answer] = await ask_states(looking)
    assert answer.state is not None
    assert answer.state["counts"]["cached_tokens"] > 0
    assert 0.5 < answer.state["hit_rate"] < 1
    assert (await frontend.get("/health")).json()["hit_rate"] == answer.state["hit_rate"]
    assert answer.state["active_count"] == 0

    explained = await ask_best_worker(looking, WORKERS, {"token_ids": PROMPT})
    assert len(explained["costs"]) == 2
    cleared = await frontend.post("/clear_kv_blocks", json={})
    assert cleared.status_code == 200, cleared.text
    assert sorted(worker["instance_id"] for worker in cleared.json()["cleared_workers"]) == sorted(
        worker.instance_id for worker in workers
    )
    assert cleared.json()["failed_workers"] == []
    while await known_blocks():
        await asyncio.sleep(0.01)
    assert cached_tokens(await complete(frontend, STORY)) == 0


async def test_clearing_caches_names_unreachable_workers(deployment: Deployment) -> None:
    frontend = await deployment.frontend()
    answer = await frontend.post("/clear_kv_blocks", json={})
    assert answer.status_code == 503
    assert "is one running?" in answer.json()["message"]
    workers = [await deployment.worker() for _ in range(2)]
    await until_served(frontend, instances=2)
    gone = workers[0]
    assert gone.process.runtime._server is not None
    await gone.process.runtime._server.aclose()
    answer = await frontend.post("/clear_kv_blocks", json={})
    assert answer.status_code == 502
    [failed], [cleared] = answer.json()["failed_workers"], answer.json()["cleared_workers"]
    assert (failed["instance_id"], cleared["instance_id"]) == (gone.instance_id, workers[1].instance_id)
    assert failed["error"]
    assert cleared["response"] == {"status": "success", "cleared": 0}


async def test_clearing_caches_drops_predictions(deployment: Deployment) -> None:
    await deployment.worker()
    frontend = await deployment.frontend(use_kv_events=False)
    await until_served(frontend)
    await complete(frontend, PROMPT)
    looking = await deployment.open_runtime()
    [answer] = await ask_states(looking)
    assert answer.state is not None
    assert answer.state["index"]["block_count"] == 10
    assert (await frontend.post("/clear_kv_blocks", json={})).status_code == 200
    [answer] = await ask_states(looking)
    assert answer.state is not None
    assert answer.state["index"]["block_count"] == 0


async def test_cached_tokens_count_in_any_item(deployment: Deployment) -> None:
    """Engines over HTTP say it with the last item."""
    runtime = await deployment.open_runtime()
    caller = await deployment.open_runtime()

    async def generate(request: Any) -> Any:
        yield {"token_ids": [5]}
        yield {"token_ids": [6]}
        yield {"token_ids": [], "finish_reason": "stop", "cached_tokens": 96}

    await runtime.endpoint(str(WORKERS)).start_serving(generate)
    async with KvRouter(caller, WORKERS, RouterSettings.load(use_kv_events=False), block_size=16) as router:
        assert len(await collect(await ask(router))) == 3
        assert (router.counts.prompt_tokens, router.counts.cached_tokens) == (160, 96)
        call = await router.generate({"token_ids": PROMPT}, True)
        assert len(await collect(call)) == 3
        assert router.counts.hit_rate == 0.6


@pytest.mark.parametrize("cached", [-96, True, 9.5, "96"])
async def test_wrong_count_spoils_no_hit_rate(deployment: Deployment, cached: Any) -> None:
    runtime = await deployment.open_runtime()
    caller = await deployment.open_runtime()

    async def generate(request: Any) -> Any:
        yield {"token_ids": [5], "finish_reason": "stop", "cached_tokens": cached}

    await runtime.endpoint(str(WORKERS)).start_serving(generate)
    async with KvRouter(caller, WORKERS, RouterSettings.load(use_kv_events=False), block_size=16) as router:
        assert len(await collect(await ask(router))) == 1
        assert router.counts.hit_rate is None


async def test_a_request_takes_its_load_along_wherever_it_ends(deployment: Deployment) -> None:
    """The end, a cancel, a drop, an error: whatever becomes of a call, its booking goes with it."""
    worker = await deployment.worker()
    router, _ = await deployment.router(router_replica_sync=False)
    chooser = router.chooser

    items = [item async for item in await ask(router)]
    assert items[-1]["finish_reason"] == "length"
    assert not chooser.bookings

    worker.engine.gate.clear()
    call = await ask(router, max_tokens=2000)
    [booking] = chooser.bookings.values()
    assert booking.prefill_tokens == len(PROMPT)
    worker.engine.gate.set()
    await anext(call)
    assert booking.prefill_tokens == 0
    assert chooser.loads()[booking.choice.worker].request_count == 1
    await call.aclose()
    assert not chooser.bookings

    call = await ask(router, max_tokens=2000)
    await anext(call)
    assert chooser.bookings
    del call  # the rest will never be read
    await until(lambda: not chooser.bookings)

    call = await ask(router, max_tokens=2000)
    await anext(call)
    reading = asyncio.ensure_future(collect(call))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await call.aclose()
    assert not chooser.bookings

    with pytest.raises(PlaneError):
        async for _ in await router.generate({"token_ids": [1] * 100_000, "model": "demo"}, False):
            pass
    assert not chooser.bookings
    assert chooser.loads() == {}


async def collect(call: Any) -> list[Any]:
    return [item async for item in call]


async def test_a_worker_that_dies_takes_its_bookings_along(deployment: Deployment) -> None:
    """Mid-stream the error is the caller's; before the first item another worker takes the request."""
    workers = [await deployment.worker() for _ in range(2)]
    router, _ = await deployment.router(router_replica_sync=False)
    await until(lambda: len(router.instance_ids()) == 2)
    for worker in workers:
        worker.engine.gate.clear()
    call = await ask(router)
    reading = asyncio.ensure_future(collect(call))
    await until(lambda: any(worker.engine.request_count for worker in workers))
    first = next(worker for worker in workers if worker.engine.request_count)
    other = next(worker for worker in workers if worker is not first)
    assert [booking.choice.worker.instance_id for booking in router.chooser.bookings.values()] == [
        first.instance_id
    ]
    other.engine.gate.set()
    assert first.process.runtime._server is not None
    await first.process.runtime._server.aclose()  # as a crash looks from outside
    assert (await reading)[-1]["finish_reason"] == "length"
    assert call.choice.worker.instance_id == other.instance_id
    assert other.engine.request_count == 1
    assert not router.chooser.bookings
    assert router.chooser.loads() == {}

    call = await ask(router, max_tokens=2000)
    await anext(call)
    assert other.process.runtime._server is not None
    await other.process.runtime._server.aclose()
    with pytest.raises(PlaneError):
        await collect(call)
    assert not router.chooser.bookings


async def test_ranks_are_chosen_one_by_one(deployment: Deployment) -> None:
    worker = await deployment.worker(data_parallel_size=2)
    router, _ = await deployment.router(router_replica_sync=False)
    worker.engine.gate.clear()
    calls = [await ask(router) for _ in range(2)]
    assert sorted(call.choice.worker for call in calls) == [(worker.instance_id, 0), (worker.instance_id, 1)]
    worker.engine.gate.set()
    for call in calls:
        await collect(call)
    await until(lambda: knows(router, blocks=20))
    blocks = router.state().workers
    assert [(entry["dp_rank"], entry["cached_blocks"]) for entry in blocks] == [(0, 10), (1, 10)]


@pytest.mark.parametrize("how", ["no events", "no event plane"])
async def test_without_events_the_router_predicts(deployment: Deployment, how: str) -> None:
    plane = {"event_plane": "none"} if how == "no event plane" else {}
    workers = [await deployment.worker() for _ in range(2)]
    router, _ = await deployment.router(plane, use_kv_events=how != "no events")
    await until(lambda: len(router.instance_ids()) == 2)
    assert router.indexer is None
    first = await ask(router)
    await collect(first)
    for _ in range(3):
        call = await ask(router)
        assert call.choice.worker == first.choice.worker
        assert call.choice.matched.device == 10
        assert (await collect(call))[0]["cached_tokens"] > 0
    state = router.state()
    assert (state.mode, state.index["block_count"]) == ("predicted", 10)
    assert sum(entry["cached_blocks"] for entry in state.workers) == 10
    gone = next(worker for worker in workers if worker.instance_id == first.choice.worker.instance_id)
    deployment.processes.remove(gone.process)
    await gone.process.end()
    await until(lambda: router.state().index["block_count"] == 0)
