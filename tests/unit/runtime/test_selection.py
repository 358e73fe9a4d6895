"""Policies: pure choices among candidates."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from dynamo_redis.errors import ConfigError, NoInstances
from dynamo_redis.runtime.selection import Only, policy


@dataclass
class Worker:
    instance_id: int
    in_flight: int = 0


def test_round_robin_takes_each_in_turn() -> None:
    workers = [Worker(n) for n in range(4)]
    choose = policy("round_robin", random.Random(1))
    chosen = [choose(workers).instance_id for _ in range(8)]
    assert chosen[:4] == chosen[4:]
    assert sorted(chosen[:4]) == [0, 1, 2, 3]


def test_round_robin_survives_a_shrinking_set() -> None:
    workers = [Worker(n) for n in range(5)]
    choose = policy("round_robin", random.Random(1))
    for _ in range(20):
        assert choose(workers) in workers
        if len(workers) > 1:
            workers.pop()


def test_random_chooses_all_evenly() -> None:
    workers = [Worker(n) for n in range(4)]
    choose = policy("random", random.Random(7))
    counts = Counter(choose(workers).instance_id for _ in range(4000))
    assert all(850 < counts[n] < 1150 for n in range(4))


def test_p2c_compares_two_different_workers() -> None:
    idle, busy = Worker(0), Worker(1, in_flight=9)
    choose = policy("p2c", random.Random(3))
    assert all(choose([idle, busy]) is idle for _ in range(100))
    assert choose([busy]) is busy


def test_p2c_spreads_a_burst_better_than_random() -> None:
    def worst(mode: str) -> int:
        workers = [Worker(n) for n in range(16)]
        choose = policy(mode, random.Random(5))
        for _ in range(1600):
            choose(workers).in_flight += 1
        return max(worker.in_flight for worker in workers)

    assert worst("p2c") <= 105 < worst("random")


def test_least_loaded_takes_the_minimum_equals_in_turn() -> None:
    workers = [Worker(0, 3), Worker(1, 1), Worker(2, 1)]
    choose = policy("least_loaded", random.Random(2))
    assert {choose(workers).instance_id for _ in range(10)} == {1, 2}


def test_only_chooses_its_instance() -> None:
    workers = [Worker(1), Worker(2)]
    assert Only(2)(workers) is workers[1]
    with pytest.raises(NoInstances, match="instance ff"):
        Only(255)(workers)


def test_unknown_mode_is_named() -> None:
    with pytest.raises(ConfigError, match="round_robin"):
        policy("fastest", random.Random())
