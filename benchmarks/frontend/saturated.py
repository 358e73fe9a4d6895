"""F1, F2 and F3: answers whose tokens come one step apart, as fast as the deployment sends them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.frontend.caller import Load
from benchmarks.frontend.prompts import MODEL, model_directory
from benchmarks.frontend.sides import (
    STEP_APART,
    Figures,
    Side,
    callers,
    dynamo,
    fastapi,
    our_frontend,
    our_workers,
)
from benchmarks.harness.processes import Driver
from benchmarks.harness.report import Measured


def alternate(
    title: str, rounds: int, caller: Driver, load: Mapping[str, Any], sides: Mapping[str, Side]
) -> dict[str, list[Figures]]:
    """Put a load on the sides in turn, round by round; the side that goes first changes. Returns the figures
    of each side's rounds."""
    taken: dict[str, list[Figures]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            side = sides[name]
            figures = side.measure(caller, Load(port=side.port, model=MODEL, **load))
            taken[name].append(figures)
            print(f"{title} round {number + 1}, {name}: {figures.summary()}", flush=True)
    return taken


def against_dynamo(rounds: int) -> dict[str, Measured]:
    """Measure F1 in requests/s, and F2 in ms of CPU a request."""
    speed = ("--speedup-ratio", STEP_APART)
    with (
        model_directory() as model,
        callers(model) as caller,
        our_workers(model, *speed) as workers,
        our_frontend(workers) as mine,
        dynamo(model, *speed) as rival,
    ):
        taken = alternate("F1", rounds, caller, {}, {"ours": mine, "Dynamo": rival})
    one, other = taken["ours"], taken["Dynamo"]
    ours_cpu, rival_cpu = ([each.cpu_ms() for each in figures] for figures in (one, other))
    return {
        "F1": Measured.against([each.per_s for each in one], [each.per_s for each in other]),
        "F2": Measured.against(ours_cpu, rival_cpu),
    }


def against_fastapi(rounds: int) -> dict[str, Measured]:
    """Measure F3 in requests/s: both frontends have the same workers."""
    with (
        model_directory() as model,
        callers(model) as caller,
        our_workers(model, "--speedup-ratio", STEP_APART) as workers,
        our_frontend(workers) as mine,
        fastapi(workers, model) as rival,
    ):
        taken = alternate("F3", rounds, caller, {}, {"ours": mine, "FastAPI": rival})
    return {"F3": Measured.against(*([each.per_s for each in taken[name]] for name in ("ours", "FastAPI")))}
