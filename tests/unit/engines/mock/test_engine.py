"""The mock engine: the items of a request, their order, and the state after it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import pytest
from tokenizers import Tokenizer

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.engines.base import AllBlocksCleared, Engine, KvEvent, KvEventSink, report_to
from dynamo_redis.engines.mock.engine import MockEngine
from dynamo_redis.errors import ConfigError, Draining, InvalidRequest, ModelError, Overloaded
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.models.directory import ModelDirectory, ModelFile
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context
from dynamo_redis.router.prompts import block_hashes

EOS = 2


class Oracle(Protocol):
    """The `oracle` fixture."""

    stored: set[int]
    events: list[KvEvent]

    def __call__(self, event: KvEvent) -> None: ...


class StartEngine(Protocol):
    def __call__(
        self, *, kv_events: KvEventSink | None = None, **settings: Any
    ) -> AbstractAsyncContextManager[MockEngine]: ...


@pytest.fixture
def running(demo_model: ModelDirectory) -> StartEngine:
    """A starter of engines without delays, unless the settings have them."""

    @asynccontextmanager
    async def run(*, kv_events: KvEventSink | None = None, **settings: Any) -> AsyncIterator[MockEngine]:
        engine = MockEngine(MockEngineSettings(**{"speedup_ratio": 0, **settings}), demo_model)
        if kv_events is not None:
            engine.cache.events = kv_events
        await engine.start()
        try:
            yield engine
        finally:
            await engine.aclose()

    return run


def _request(
    prompt: Sequence[int] = (5, 6, 7), sampling: dict[str, Any] | None = None, **stop: Any
) -> GenerateRequest:
    return cast(
        "GenerateRequest",
        {
            "model": "demo",
            "token_ids": list(prompt),
            "stop_conditions": stop,
            "sampling_options": sampling or {},
            "eos_token_ids": [EOS],
        },
    )


async def _items(
    engine: Engine, request: GenerateRequest, context: Context | None = None
) -> list[GenerateItem]:
    return [item async for item in engine.generate(request, context or Context())]


def _tokens(items: list[GenerateItem]) -> list[int]:
    return [token for item in items for token in item["token_ids"]]


async def test_answer_is_streamed_and_ends_by_itself(
    running: StartEngine, demo_model: ModelDirectory
) -> None:
    async with running() as engine:
        items = await _items(engine, _request())
    assert all(len(item["token_ids"]) == 1 and "finish_reason" not in item for item in items[:-1])
    assert items[-1] == {"token_ids": [], "finish_reason": "stop"}
    assert EOS not in _tokens(items)
    assert Tokenizer.from_buffer(demo_model.read_tokenizer()).decode(_tokens(items)).endswith(".")


async def test_same_prompt_gets_the_same_answer(running: StartEngine) -> None:
    async with running() as engine:
        alone = _tokens(await _items(engine, _request()))
    async with running(max_num_seqs=3, total_kv_blocks=24, max_num_batched_tokens=16) as engine:
        crowd = await asyncio.gather(
            *(_items(engine, _request((5, 6, 7) if n % 2 else (n, n))) for n in range(10))
        )
    assert all(_tokens(items) == alone for items in crowd[1::2])
    assert len({tuple(_tokens(items)) for items in crowd[::2]}) == 5


async def test_seed_changes_the_answer_unless_greedy(running: StartEngine) -> None:
    async with running() as engine:

        async def answer(**sampling: Any) -> list[int]:
            return _tokens(await _items(engine, _request(sampling=sampling)))

        plain = await answer()
        assert await answer(seed=1) != plain
        assert await answer(seed=1) == await answer(seed=1, temperature=0.7)
        assert await answer(seed=-1) != await answer(seed=1)
        assert await answer(seed=1, temperature=0) == plain


async def test_max_tokens_cuts_the_answer_with_length(running: StartEngine) -> None:
    async with running() as engine:
        whole = _tokens(await _items(engine, _request()))
        for count in (1, 2, 20):
            items = await _items(engine, _request(max_tokens=count))
            assert _tokens(items) == whole[:count]
            assert items[-1]["finish_reason"] == "length"
            assert len(items) == count


async def test_ignore_eos_and_min_tokens_lengthen_the_answer(running: StartEngine) -> None:
    async with running() as engine:
        whole = _tokens(await _items(engine, _request()))
        longer = len(whole) + 100
        ignoring = await _items(engine, _request(ignore_eos=True, max_tokens=longer))
        least = await _items(engine, _request(min_tokens=longer))
    assert (len(_tokens(ignoring)), ignoring[-1]["finish_reason"]) == (longer, "length")
    assert (len(_tokens(least)), least[-1]["finish_reason"]) == (longer, "stop")
    assert _tokens(least)[: len(whole)] == whole


async def test_stop_token_ends_the_answer_and_is_hidden(running: StartEngine) -> None:
    async with running() as engine:
        whole = _tokens(await _items(engine, _request()))
        stop = whole[10]
        first = whole.index(stop)
        items = await _items(engine, _request(stop_token_ids_hidden=[stop]))
        assert _tokens(items) == whole[:first]
        assert items[-1]["finish_reason"] == "stop"
        later = await _items(engine, _request(stop_token_ids_hidden=[stop], min_tokens=11))
        assert _tokens(later)[:11] == whole[:11]
        eos = {**_request(), "eos_token_ids": [stop]}
        assert _tokens(await _items(engine, cast("GenerateRequest", eos))) == whole[:first]


async def test_first_item_has_the_cached_tokens(running: StartEngine) -> None:
    prompt = list(range(100, 150))
    async with running(block_size=16) as engine:
        first = await _items(engine, _request(prompt, max_tokens=3))
        again = await _items(engine, _request(prompt, max_tokens=1))
        longer = await _items(engine, _request([*prompt[:32], *range(40)], max_tokens=3))
    assert [item.get("cached_tokens") for item in first] == [0, None, None]
    assert again[0]["cached_tokens"] == 48
    assert longer[0]["cached_tokens"] == 32


async def test_requests_share_blocks_by_salt_only(running: StartEngine) -> None:
    """The router finds the blocks of a salt by the same names, and those of no other salt."""
    publisher = KvPublisher(None, block_size=16)
    prompt = list(range(100, 196))
    names = {salt: block_hashes(prompt, 16, None, salt) for salt in (None, "one", "two")}
    async with running(kv_events=report_to(publisher), block_size=16) as engine:
        for salt, others in ((None, ("one", "two")), ("one", ("two",)), ("two", ())):
            request: Any = _request(prompt, max_tokens=1)
            if salt is not None:
                request["cache_salt"] = salt
            items = [await _items(engine, request) for _ in range(2)]
            assert [each[0]["cached_tokens"] for each in items] == [0, 80]
            held = set(publisher.blocks())
            assert held.issuperset(names[salt])
            for other in others:
                assert held.isdisjoint(names[other])
    assert len({name for each in names.values() for name in each}) == 18


async def test_empty_answer_has_the_cached_tokens(running: StartEngine) -> None:
    async with running() as engine:
        first_token = _tokens(await _items(engine, _request(max_tokens=1)))[0]
        items = await _items(engine, _request(stop_token_ids_hidden=[first_token]))
    assert items == [{"token_ids": [], "finish_reason": "stop", "cached_tokens": 0}]


async def test_events_match_the_cache_exactly(running: StartEngine, oracle: Oracle) -> None:
    async with running(
        kv_events=oracle, total_kv_blocks=40, block_size=4, max_num_seqs=5, max_num_batched_tokens=20
    ) as engine:

        async def client(number: int) -> None:
            for turn in range(6):
                prompt = [*range(8), number % 3, *range(turn * 3)]
                context = Context()
                count = 0
                async for _ in engine.generate(_request(prompt, max_tokens=30), context):
                    assert engine.cache.stored() == oracle.stored
                    count += 1
                    if number == 4 and count == 5:
                        context.stop_generating()

        await asyncio.gather(*(client(number) for number in range(8)))
        assert engine.cache.active_count == 0
        assert engine.cache.stored() == oracle.stored
        assert {type(event).__name__ for event in oracle.events} == {"BlocksStored", "BlocksRemoved"}

        assert await engine.clear_kv_blocks() > 0
        assert oracle.events[-1] == AllBlocksCleared()
        assert not engine.cache.stored()


@pytest.mark.parametrize("strength", ["stop", "kill"])
async def test_cancelled_request_frees_its_blocks_at_once(running: StartEngine, strength: str) -> None:
    async with running() as engine:
        context = Context()
        answer = engine.generate(_request(range(40), ignore_eos=True), context)
        await anext(answer)
        assert engine.cache.active_count > 0
        context.stop_generating() if strength == "stop" else context.kill()
        assert (engine.cache.active_count, engine.running_count) == (0, 0)
        assert [item async for item in answer] == [{"token_ids": [], "finish_reason": "cancelled"}]


async def test_waiting_request_can_be_cancelled(running: StartEngine) -> None:
    async with running(max_num_seqs=1, speedup_ratio=1, decode_step_s=60) as engine:
        contexts = [Context(), Context()]
        answers = [
            asyncio.create_task(_items(engine, _request(ignore_eos=True), context)) for context in contexts
        ]
        while engine.waiting_count != 1:
            await asyncio.sleep(0)
        contexts[1].stop_generating()
        assert engine.waiting_count == 0
        assert (await answers[1])[-1]["finish_reason"] == "cancelled"
        contexts[0].stop_generating()
        await answers[0]


async def test_request_stopped_before_it_came_ends_at_once(running: StartEngine) -> None:
    async with running() as engine:
        context = Context()
        context.stop_generating()
        assert await _items(engine, _request(), context) == [{"token_ids": [], "finish_reason": "cancelled"}]
        assert engine.running_count == engine.waiting_count == 0


async def test_closed_generator_frees_its_blocks(running: StartEngine) -> None:
    async with running() as engine:
        answer = engine.generate(_request(range(40), ignore_eos=True), Context())
        await anext(answer)
        await answer.aclose()
        assert engine.cache.active_count == 0


async def test_cancelled_task_frees_its_blocks(running: StartEngine) -> None:
    async with running(speedup_ratio=1, decode_step_s=60) as engine:
        task = asyncio.create_task(_items(engine, _request(range(40))))
        while engine.running_count == 0:
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert engine.cache.active_count == 0


async def test_full_queue_is_overloaded(running: StartEngine) -> None:
    async with running(max_num_seqs=2, max_num_waiting=1, speedup_ratio=1, decode_step_s=60) as engine:
        tasks = [asyncio.create_task(_items(engine, _request())) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await _items(engine, _request())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert engine.running_count == engine.waiting_count == 0


async def test_all_requests_end_though_blocks_run_out(running: StartEngine) -> None:
    async with running() as engine:
        alone = _tokens(await _items(engine, _request(range(20), max_tokens=60, ignore_eos=True)))
    async with running(total_kv_blocks=6, block_size=16, max_num_seqs=8) as engine:
        crowd = await asyncio.gather(
            *(_items(engine, _request(range(20), max_tokens=60, ignore_eos=True)) for _ in range(8))
        )
    assert [_tokens(items) for items in crowd] == [alone] * 8


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ([1, 2], "object"),
        ({}, "token_ids"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": "abc"}, "token_ids"),
        ({"token_ids": [1, "a"]}, "token_ids"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"token_ids": [1], "stop_conditions": 5}, "stop_conditions"),
        ({"token_ids": [1], "stop_conditions": {"max_tokens": 0}}, "max_tokens"),
        ({"token_ids": [1], "stop_conditions": {"max_tokens": "9"}}, "max_tokens"),
        ({"token_ids": [1], "stop_conditions": {"min_tokens": -1}}, "min_tokens"),
        ({"token_ids": [1], "sampling_options": {"seed": 0.5}}, "seed"),
        ({"token_ids": [1], "sampling_options": {"logit_bias": {"5": 1.0}}}, "logit_bias"),
        ({"token_ids": [1], "sampling_options": {"guided_decoding": {"regex": "a"}}}, "response_format"),
        ({"token_ids": [1], "eos_token_ids": 2}, "stop token ids"),
        ({"token_ids": [1], "stop_conditions": {"stop_token_ids_hidden": [[2]]}}, "stop token ids"),
        ({"token_ids": [1] * 32768}, "context length 32768"),
    ],
)
async def test_invalid_requests_are_refused(running: StartEngine, request_: Any, words: str) -> None:
    async with running() as engine:
        with pytest.raises(InvalidRequest, match=words):
            await _items(engine, request_)
        assert engine.running_count == engine.waiting_count == 0


async def test_cache_size_limits_prompt_and_answer(
    running: StartEngine,
) -> None:
    async with running(total_kv_blocks=4, block_size=16) as engine:
        with pytest.raises(InvalidRequest, match="4 blocks of 16"):
            await _items(engine, _request(range(64)))
        items = await _items(engine, _request(range(60), ignore_eos=True, max_tokens=100))
    assert (len(_tokens(items)), items[-1]["finish_reason"]) == (4, "length")


async def test_speedup_ratio_0_answers_at_once(running: StartEngine) -> None:
    async with running(speedup_ratio=0, decode_step_s=3600, prefill_token_s=60) as engine:
        async with asyncio.timeout(30):
            await _items(engine, _request(max_tokens=50))


async def test_busy_engine_lets_other_tasks_run(running: StartEngine) -> None:
    async with running() as engine:
        task = asyncio.create_task(_items(engine, _request(ignore_eos=True, max_tokens=2000)))
        turns = 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns >= 2000


async def test_token_takes_the_time_of_a_step(running: StartEngine) -> None:
    async with running(speedup_ratio=2, decode_step_s=0.02, prefill_token_s=0.01) as engine:
        started_at = time.monotonic()
        await _items(engine, _request(range(10), max_tokens=4, ignore_eos=True))
        elapsed_s = time.monotonic() - started_at
    assert elapsed_s >= (4 * 0.02 + 10 * 0.01) / 2 - 0.005


async def test_idle_engine_sleeps(running: StartEngine) -> None:
    async with running() as engine:
        await _items(engine, _request(max_tokens=3))
        await asyncio.sleep(0)
        steps = engine.ranks[0].steps
        assert steps is not None
        waits_for = engine.ranks[0]._work_came
        assert waits_for is not None
        for _ in range(100):
            await asyncio.sleep(0)
        assert engine.ranks[0]._work_came is waits_for
        assert not waits_for.done()
        assert len(await _items(engine, _request(max_tokens=3))) == 3


async def test_closed_engine_fails_its_requests_as_retryable(running: StartEngine) -> None:
    async with running(max_num_seqs=1, speedup_ratio=1, decode_step_s=60) as engine:
        tasks = [asyncio.create_task(_items(engine, _request())) for _ in range(2)]
        while engine.waiting_count != 1 or engine.running_count != 1:
            await asyncio.sleep(0)
        await engine.aclose()
        for task in tasks:
            with pytest.raises(Draining):
                await task
        with pytest.raises(Draining):
            await _items(engine, _request())


async def test_engine_not_started_refuses_requests(demo_model: ModelDirectory) -> None:
    engine = MockEngine(MockEngineSettings(), demo_model)
    with pytest.raises(Draining):
        await _items(engine, _request())
    await engine.aclose()


async def test_failing_step_loop_ends_all_requests(
    running: StartEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError

    async with running() as engine:
        monkeypatch.setattr(engine.ranks[0].batch, "complete", broken)
        with caplog.at_level(logging.ERROR), pytest.raises(Draining):
            await _items(engine, _request())
        await asyncio.sleep(0)
        assert "step loop failed" in caplog.text


def test_contradicting_settings_are_refused(demo_model: ModelDirectory) -> None:
    with pytest.raises(ConfigError, match="DYN_MOCK_MAX_NUM_BATCHED_TOKENS=8"):
        MockEngine(MockEngineSettings(max_num_batched_tokens=8, max_num_seqs=9), demo_model)


async def test_unusable_tokenizer_is_named(demo_model: ModelDirectory, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {}}')
    broken = replace(
        demo_model, files={**demo_model.files, "tokenizer.json": ModelFile("tokenizer.json", path, 0, "")}
    )
    engine = MockEngine(MockEngineSettings(), broken)
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a usable tokenizer"):
        await engine.start()
    await engine.aclose()


def test_mock_engine_is_an_engine(demo_model: ModelDirectory) -> None:
    check: Callable[[MockEngineSettings, ModelDirectory], Engine] = MockEngine
    capacity = check(MockEngineSettings(total_kv_blocks=100, block_size=32), demo_model).capacity
    assert (capacity.total_kv_blocks, capacity.kv_block_size) == (100, 32)
