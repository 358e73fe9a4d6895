"""Properties, tried with other examples until the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from hypothesis import HealthCheck, Phase, seed, settings

EXAMPLES_A_ROUND: Final = 200

Property = Callable[[], None]


def one_round(make: Callable[[], Property], round_seed: int, examples: int = EXAMPLES_A_ROUND) -> None:
    """Try a fresh property with examples drawn from a seed. Raises what the smallest failing one raises, with
    the example in its notes; the same seed draws the same examples."""
    settle = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.target, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    seed(round_seed)(settle(make()))()


def rounds(
    make: Callable[[], Property], first_seed: int, seconds: float, report: Callable[[int, int], None]
) -> None:
    """Rounds with `first_seed`, the next seed, and so on, for so many seconds, at least one.

    `report` is told the examples so far and the seed of the round that begins.
    """
    deadline, number = time.monotonic() + seconds, 0
    while number == 0 or time.monotonic() < deadline:
        report(number * EXAMPLES_A_ROUND, first_seed + number)
        one_round(make, first_seed + number)
        number += 1
    report(number * EXAMPLES_A_ROUND, first_seed + number)
