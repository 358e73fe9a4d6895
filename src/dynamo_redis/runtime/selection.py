"""The policies that choose an instance among the candidates. Pure, and fast enough for every request."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeVar, get_args

from dynamo_redis.errors import ConfigError, NoInstances

RouterMode = Literal["round_robin", "random", "p2c", "least_loaded"]


class Candidate(Protocol):
    """An instance as a policy sees it."""

    @property
    def instance_id(self) -> int: ...

    @property
    def in_flight(self) -> int:
        """The number of this process's requests at the instance that have not ended."""
        ...


C = TypeVar("C", bound=Candidate)


class Policy(Protocol):
    """A choice of one of a non-empty sequence, whose order is stable between changes of membership."""

    def __call__(self, candidates: Sequence[C]) -> C: ...


class RoundRobin:
    """Each candidate in turn."""

    __slots__ = ("_turn",)

    def __init__(self, rng: random.Random) -> None:
        # A random start keeps many young clients from beginning at the same instance.
        self._turn = rng.getrandbits(16)

    def __call__(self, candidates: Sequence[C]) -> C:
        self._turn += 1
        return candidates[self._turn % len(candidates)]


class RandomChoice:
    """A random candidate; all are equally likely."""

    __slots__ = ("_rng",)

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, candidates: Sequence[C]) -> C:
        return candidates[int(self._rng.random() * len(candidates))]


class PowerOfTwoChoices:
    """The less loaded of two random candidates (Mitzenmacher, "The Power of Two Choices", 1996)."""

    __slots__ = ("_rng",)

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, candidates: Sequence[C]) -> C:
        count = len(candidates)
        if count == 1:
            return candidates[0]
        first = int(self._rng.random() * count)
        second = (first + 1 + int(self._rng.random() * (count - 1))) % count
        one, other = candidates[first], candidates[second]
        return one if one.in_flight <= other.in_flight else other


class LeastLoaded:
    """The candidate with the fewest requests of this process under way; equal ones in turn."""

    __slots__ = ("_turn",)

    def __init__(self, rng: random.Random) -> None:
        self._turn = rng.getrandbits(16)

    def __call__(self, candidates: Sequence[C]) -> C:
        count = len(candidates)
        self._turn += 1
        start = self._turn % count
        best = candidates[start]
        for offset in range(1, count):
            candidate = candidates[(start + offset) % count]
            if candidate.in_flight < best.in_flight:
                best = candidate
        return best


class Only:
    """One given instance. The choice raises NoInstances if it is not among the candidates."""

    __slots__ = ("_instance_id",)

    def __init__(self, instance_id: int) -> None:
        self._instance_id = instance_id

    def __call__(self, candidates: Sequence[C]) -> C:
        for candidate in candidates:
            if candidate.instance_id == self._instance_id:
                return candidate
        raise NoInstances(f"instance {self._instance_id:x} is not known, or has been tried")


_POLICIES: dict[str, Callable[[random.Random], Policy]] = {
    "round_robin": RoundRobin,
    "random": RandomChoice,
    "p2c": PowerOfTwoChoices,
    "least_loaded": LeastLoaded,
}


def policy(mode: str, rng: random.Random) -> Policy:
    """Return the policy of a router mode. Raises ConfigError for an unknown one."""
    make = _POLICIES.get(mode)
    if make is None:
        hint = "; for kv make a dynamo_redis.router.kv_router.KvRouter" if mode == "kv" else ""
        raise ConfigError(
            f"unknown router mode {mode!r}: choose one of {', '.join(get_args(RouterMode))}{hint}"
        )
    return make(rng)
