"""`make replay` on a handful of requests: real processes and sockets, and indexes that equal the caches."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.replay.__main__ import main
from benchmarks.replay.report import load_entries
from benchmarks.replay.trace import synthetic_trace


def test_replay_ends_with_indexes_equal_to_the_caches(tmp_path: Path) -> None:
    trace = tmp_path / "handful.jsonl"
    with trace.open("w") as lines:
        for request in synthetic_trace(40, seed=1).requests:
            fields = (1e3 * request.arrival_s, request.prompt_count, request.output_count, request.block_ids)
            names = ("timestamp", "input_length", "output_length", "hash_ids")
            print(json.dumps(dict(zip(names, fields, strict=True))), file=lines)
    results = tmp_path / "replay.json"
    arguments = f"--trace {trace} --modes kv --replicas 2 --arrivals poisson --workers 2 --kv-blocks 112"
    omniscient, kv = main(
        [*arguments.split(), "--speedup", "100", "--results", str(results), "--no-plot", "--faults", "none"]
    )
    assert kv.index == "equal"
    assert (kv.requests, kv.failed_count, kv.lost_count) == (40, 0, 0)
    assert kv.hit_rate > 0
    assert kv.events_per_s
    assert load_entries(results) == [omniscient, kv]
