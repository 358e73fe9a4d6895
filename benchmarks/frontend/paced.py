"""F4 and F5: two hundred answers at a time, a token each 20 ms: the CPU time of a token."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from benchmarks.frontend.prompts import model_directory
from benchmarks.frontend.saturated import alternate
from benchmarks.frontend.sides import (
    Figures,
    callers,
    dynamo,
    dynamo_python,
    fastapi,
    our_frontend,
    our_workers,
)
from benchmarks.harness.report import Measured

STREAMS: Final = 200
TOKENS: Final = 64
OUR_PACE: Final = (
    *("--speedup-ratio", "1", "--decode-step", "20ms"),
    *("--decode-sequence", "0", "--prefill-token", "0"),
)
LOAD: Final = {"concurrency": STREAMS, "seconds": 8.0, "warm_s": 4.0, "answer_tokens": TOKENS}

_PROFILE: Final = """
import sys, numpy
numpy.savez(
    sys.argv[1], prefill_isl=[1.0, 1e6], prefill_ttft_ms=[0.001, 0.001],
    decode_active_kv_tokens=[0.0, 1e8], decode_context_length=[1.0, 1e6],
    decode_itl=[[20.0, 20.0], [20.0, 20.0]],
)
"""
"""A program that writes a profile for Dynamo's mocker: each step takes 20 ms, whatever is in it."""


def against_fastapi(rounds: int) -> dict[str, Measured]:
    """Measure F4: the frontend's µs of CPU a token. Both frontends have the same workers."""
    with (
        model_directory() as model,
        callers(model) as caller,
        our_workers(model, *OUR_PACE) as workers,
        our_frontend(workers) as mine,
        fastapi(workers, model) as rival,
    ):
        taken = alternate("F4", rounds, caller, LOAD, {"ours": mine, "FastAPI": rival})
    return {"F4": Measured.against(*(_token_us(taken[name], "frontend") for name in ("ours", "FastAPI")))}


def against_dynamo(rounds: int) -> dict[str, Measured]:
    """Measure F5: the µs of CPU a token of all processes."""
    with (
        model_directory() as model,
        callers(model) as caller,
        our_workers(model, *OUR_PACE) as workers,
        our_frontend(workers) as mine,
        dynamo(model, "--planner-profile-data", str(_profile(model))) as rival,
    ):
        taken = alternate("F5", rounds, caller, LOAD, {"ours": mine, "Dynamo": rival})
    return {"F5": Measured.against(*(_token_us(taken[name]) for name in ("ours", "Dynamo")))}


def _profile(model: Path) -> Path:
    path = model.with_name("pace.npz")
    subprocess.run([dynamo_python(), "-c", _PROFILE, str(path)], check=True)
    return path


def _token_us(rounds: list[Figures], *groups: str) -> list[float]:
    return [1e3 * figures.cpu_ms(*groups) / TOKENS for figures in rounds]
