"""F8: the CPU time of a request with two frontend processes on one port, against one process."""

from __future__ import annotations

from typing import Final

from benchmarks.frontend.prompts import model_directory
from benchmarks.frontend.saturated import alternate
from benchmarks.frontend.sides import (
    STEP_APART,
    WORKERS,
    await_instances,
    callers,
    our_frontend,
    our_workers,
)
from benchmarks.harness.report import Measured

QUESTIONS: Final = 16
"""Questions, each on a connection of its own: both processes get some of them."""


def two_against_one(rounds: int) -> dict[str, Measured]:
    """Measure F8: ms of CPU a request, of all processes as in F2. Both frontends have the same workers. The
    ratio of the frontends' processes alone is printed."""
    with (
        model_directory() as model,
        callers(model) as caller,
        our_workers(model, "--speedup-ratio", STEP_APART) as workers,
        our_frontend(workers, "--frontend-processes", "2") as two,
        our_frontend(workers) as one,
    ):
        for _ in range(QUESTIONS):
            await_instances(two, WORKERS)
        taken = alternate("F8", rounds, caller, {}, {"two": two, "one": one})
    two_alone, one_alone = ([each.cpu_ms("frontend") for each in taken[name]] for name in ("two", "one"))
    print(f"F8 of the frontends alone: {Measured.against(two_alone, one_alone).ratio:g}", flush=True)
    return {"F8": Measured.against(*([each.cpu_ms() for each in taken[name]] for name in ("two", "one")))}
