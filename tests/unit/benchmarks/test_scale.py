"""Suite `scale`: its shares of processes, and its simulated engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from benchmarks.scale.deployment import ServerCounts, shares
from benchmarks.scale.engine import ANSWER_BLOCKS, NEW_EACH, PROMPT_BLOCKS, SimulatedEngine

from dynamo_redis.events.kv_publisher import KvPublisher


class Events:
    """Numbers events, and keeps them."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    @property
    def next_sequence(self) -> int:
        return len(self.events)

    def publish(self, event: Any, /) -> int:
        self.events.append(event)
        return len(self.events) - 1


@pytest.mark.parametrize(
    ("count", "parts", "expected"), [(1000, 16, [62] * 8 + [63] * 8), (3, 4, [1, 1, 1]), (8, 1, [8])]
)
def test_processes_share_the_workers(count: int, parts: int, expected: Sequence[int]) -> None:
    assert shares(count, parts) == expected


def test_36_percent_of_prompts_are_repeated() -> None:
    engine, events = SimulatedEngine(1), Events()
    engine.follow([KvPublisher(events, block_size=16)])
    prompts_count = 4 * NEW_EACH
    for _ in range(prompts_count):
        chat = engine.begin()
        while engine.go_on(chat):
            pass
    new_count = sum(len(hashes) // 8 for _, _, hashes in events.events) - prompts_count * ANSWER_BLOCKS
    assert 1 - new_count / (prompts_count * PROMPT_BLOCKS) == pytest.approx(0.36)
    assert engine.rank.left_out == {}
    assert [load.running_count for load in engine.loads()] == [0]


def test_part_of_a_core_is_that_between_two_looks() -> None:
    before, after = (ServerCounts(at, cpu_s, 0, 0, 0, 0) for at, cpu_s in ((10.0, 1.0), (14.0, 2.0)))
    assert after.cpu_part_since(before) == pytest.approx(25)
