"""The soak detects growth, and does not take a warm-up or noise for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from benchmarks.replay.soak import Sample, grown, growth, make_faults, make_plan

MIB = 1 << 20


def samples(
    router_bytes: Callable[[int], int], blocks: Callable[[int], int] = lambda _: 2000
) -> list[Sample]:
    return [
        Sample(float(second), 50 * MIB, router_bytes(second), 0 if second % 7 == 0 else MIB, blocks(second))
        for second in range(1, 601)
    ]


def test_endless_growth_is_named() -> None:
    assert grown(growth(samples(lambda second: 60 * MIB + second * MIB // 20))) == ["router_bytes"]
    assert grown(growth(samples(lambda _: 60 * MIB, lambda second: 2000 + 4 * second))) == ["blocks"]


@pytest.mark.parametrize(
    "router_bytes",
    [
        lambda _: 60 * MIB,
        lambda second: 60 * MIB + min(second, 120) * MIB // 2,
        lambda second: 60 * MIB + (20 * MIB if second % 50 < 5 else 0),
    ],
    ids=["flat", "warm-up", "peaks"],
)
def test_flat_memory_is_not_named(router_bytes: Callable[[int], int]) -> None:
    assert grown(growth(samples(router_bytes))) == []


def test_every_kind_of_fault_comes() -> None:
    assert {fault for _, fault in make_faults(20)} == {"worker", "redis", "router"}
    long = make_faults(600)
    assert len(long) == 20
    assert long == sorted(long)


def test_requests_come_for_the_whole_time() -> None:
    plan = make_plan(20, seed=1)
    assert plan.load_trace().requests[-1].arrival_s / plan.speedup == pytest.approx(20)
