"""The whole matrix of suite `request`, each side on each workload: kept in `results/request_all.json`.

Read within the environment that draws it as well: no third party.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

PATH = Path(__file__).parent / "results" / "request_all.json"


@dataclass(frozen=True, slots=True)
class Cell:
    """What one side made of one workload: medians over the rounds.

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
    """What was measured so far."""
    return [Cell(**entry) for entry in json.loads(PATH.read_text())] if PATH.exists() else []


def save(cells: Iterable[Cell]) -> None:
    """Write these. Cells that were not measured this time keep their figures and their places."""
    merged = {(cell.workload, cell.side): cell for cell in (*load(), *cells)}
    PATH.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(cell), ensure_ascii=False) for cell in merged.values())
    PATH.write_text(f"[\n{lines}\n]\n")
