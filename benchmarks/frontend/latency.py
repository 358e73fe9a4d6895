"""F6 and F7: the time to the first token without other load, and the pauses that long prompts make."""

from __future__ import annotations

import sys
from typing import Any, Final

from benchmarks.frontend.caller import Load
from benchmarks.frontend.prompts import MODEL, model_directory
from benchmarks.frontend.saturated import alternate
from benchmarks.frontend.sides import STEP_APART, Figures, callers, dynamo, ours
from benchmarks.harness.processes import driver
from benchmarks.harness.report import Measured, median

SHORT: Final[dict[str, Any]] = {"concurrency": 1, "prompt_tokens": 200, "seconds": 3.0, "most_requests": 2000}
LONG: Final[dict[str, Any]] = {
    "concurrency": 1,
    "prompt_tokens": 12_000,
    "seconds": 4.0,
    "most_requests": 800,
}
UNDER_LONG: Final[dict[str, Any]] = {
    "concurrency": 4, "prompt_tokens": 12_000, "seconds": 5.0, "most_requests": 1500,
}  # fmt: skip
PAUSE_S: Final = 0.001
"""Time from the answer to a question to the next one."""


def first_tokens(rounds: int) -> dict[str, Measured]:
    """Measure F6, in ms: ours, and Dynamo's for comparison."""
    speed = ("--speedup-ratio", STEP_APART)
    with (
        model_directory() as model,
        callers(model) as caller,
        ours(model) as mine,
        dynamo(model, *speed) as rival,
    ):
        sides = {"ours": mine, "Dynamo": rival}
        short = alternate("F6 short", rounds, caller, SHORT, sides)
        long = alternate("F6 long", rounds, caller, LONG, sides)

    def medians(name: str) -> list[float]:
        return [median(each.first_token_p50_ms for each in taken[name]) for taken in (short, long)]

    for name in sides:
        print(f"F6 {name}: {_p99(short[name])}; {_p99(long[name])}", flush=True)
    return {"F6": Measured(medians("ours"), medians("Dynamo"), None, rounds)}


def _p99(rounds: list[Figures]) -> str:
    return f"p99 {median(each.first_token_p99_ms for each in rounds):g} ms"


def pauses(rounds: int) -> dict[str, Measured]:
    """Measure F7, in ms: the longest time to an answer of `/live` on a kept connection."""
    longest = []
    with (
        model_directory() as model,
        callers(model) as caller,
        ours(model) as side,
        driver(sys.executable, "start.silence_probe", side.url, str(PAUSE_S)) as probe,
    ):
        load = Load(port=side.port, model=MODEL, **UNDER_LONG)
        for number in range(rounds):
            probe.send()
            probe.answer()
            figures = side.measure(caller, load)
            probe.send()
            longest.append(1e3 * float(probe.answer()))
            print(
                f"F7 round {number + 1}: {longest[-1]:.1f} ms under {figures.per_s:.0f} long prompts/s",
                flush=True,
            )
    return {"F7": Measured.alone(longest)}
