"""X6 to X8: a million blocks in memory and as a snapshot, and the time to restore them.

X6  growth of the resident memory of a fresh process while it reads the events from a file and applies them
X7  the snapshot's bytes
X8  decoding the snapshot against building the same index from the stored batches, in one fresh process
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.harness.processes import in_fresh_process
from benchmarks.harness.report import Measured
from benchmarks.index.sides import indexed, to_batches
from benchmarks.index.workload import WORKERS, Chats
from dynamo_redis.router.index.snapshot import IndexSnapshot, decode_snapshot, encode_snapshot
from dynamo_redis.store.event_base import BEGINNING

BLOCKS = 1_000_000
UNBOUNDED = 1 << 40


def million(rounds: int) -> dict[str, Measured]:
    """Measure X6 in bytes a block, X7 in MB, X8 in s."""
    with tempfile.TemporaryDirectory() as directory:
        stored = Path(directory) / "batches"
        in_fresh_process(_write, stored)
        sizes = [in_fresh_process(_memory, stored) for _ in range(rounds)]
        restores = [in_fresh_process(_restore, stored) for _ in range(rounds)]
    restored, built, snapshot_mb = zip(*restores, strict=True)
    return {
        "X6": Measured.alone(sizes),
        "X7": Measured.alone(snapshot_mb),
        "X8": Measured.against(restored, built),
    }


def _write(path: Path) -> None:
    """Write batches that bring a million different blocks: chats grow and move, and nothing is evicted."""
    chats = Chats(11, WORKERS, UNBOUNDED)
    with path.open("wb") as file:
        for batch in to_batches(chats.events_until(BLOCKS)):
            file.write(len(batch).to_bytes(4, "little") + batch)


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while size := file.read(4):
            yield file.read(int.from_bytes(size, "little"))


def _memory(path: Path) -> float:
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    index = indexed(_read(path))
    gc.collect()
    return float(process.memory_info().rss - before) / index.block_count


def _restore(path: Path) -> tuple[float, float, float]:
    """Return the seconds to restore, the seconds to build, and the MB of the snapshot."""
    batches = list(_read(path))
    began = time.perf_counter()
    index = indexed(batches)
    built_s = time.perf_counter() - began
    content = b"".join(encode_snapshot(IndexSnapshot((BEGINNING,), {}, index)))
    began = time.perf_counter()
    restored = decode_snapshot(content)
    restored_s = time.perf_counter() - began
    if restored.index.block_counts() != index.block_counts():
        raise RuntimeError("the restored index differs")
    return restored_s, built_s, len(content) / 1e6
