"""The matrix of suite `request`, each side on each of its workloads, and its measured figures.

The program that draws it imports it as well, so it uses no third-party package.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks.request.workloads import WORKLOADS

WORKERS: Final = 4
"""Serving processes of a side that goes through a runtime API."""

OURS, OURS_RUNTIME = "ours", f"ours runtime ×{WORKERS}"
NATS, NATS_CALLBACK = "nats-py", "nats-py callback"
GRPC, AIOHTTP, PYZMQ = "grpc.aio", "aiohttp", "pyzmq"
RAW, RAW_CALLBACK = "raw uvloop", "raw uvloop callback"
DYNAMO_PLANE, DYNAMO_RUNTIME = "Dynamo 1.6.1", f"Dynamo 1.6.1 ×{WORKERS}"

_UNARY = ["unary c=1", "unary c=64", "unary c=256"]
_STREAMS = ["burst", "tick"]
STAGES: Final[tuple[dict[str, list[str]], ...]] = (
    {
        OURS: list(WORKLOADS),
        NATS: list(WORKLOADS),
        NATS_CALLBACK: _STREAMS,
        GRPC: list(WORKLOADS),
        AIOHTTP: list(WORKLOADS),
        PYZMQ: list(WORKLOADS),
        DYNAMO_PLANE: list(WORKLOADS),
        RAW: _UNARY,
        RAW_CALLBACK: _UNARY,
    },
    {
        OURS_RUNTIME: ["unary c=64", *_STREAMS],
        DYNAMO_RUNTIME: ["unary c=64", *_STREAMS],
    },
)
"""Sides that run at the same time, and the workloads of each."""

PATH = Path(__file__).parents[1] / "results" / "request_all.json"


@dataclass(frozen=True, slots=True)
class Cell:
    """The figures of a side on one workload: medians over the rounds.

    `per_s` counts units (requests, streamed items, or MiB sent and echoed), `p50_ms` and `p99_ms` are of
    whole answers, `cpu_s_per_100k` is of all processes of the side for 100,000 units.
    """

    workload: str
    side: str
    unit: str
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_s_per_100k: float
    rounds: int


def load() -> list[Cell]:
    """Return the saved cells."""
    return [Cell(**entry) for entry in json.loads(PATH.read_text())] if PATH.exists() else []


def save(cells: Iterable[Cell]) -> None:
    """Save these cells, in the matrix's order. Cells that were not measured this time keep their figures."""
    merged = {(cell.workload, cell.side): cell for cell in (*load(), *cells)}
    places = [(workload, side) for workload in WORKLOADS for stage in STAGES for side in stage]
    kept = [merged[place] for place in places if place in merged]
    PATH.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(cell), ensure_ascii=False) for cell in kept)
    PATH.write_text(f"[\n{lines}\n]\n")
