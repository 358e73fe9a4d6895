"""Suite `events`: how fast events are published, consumed and applied, against JetStream.

Rows are measured by group; see README.md for how. `--rows E1,E2` runs some; those that do not run keep their
figures.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version as distribution_version

from benchmarks.event_workload import BATCH_COUNT, EVENT_BYTES
from benchmarks.events_latency import EVENTS_PER_S, ROUTERS_COUNT, latency
from benchmarks.events_rates import OURS_SYNCED_ALIKE, consuming, publishing
from benchmarks.jetstream import nats_binary, nats_python, sync_interval
from benchmarks.options import rounds_count
from benchmarks.report import Measured, Row, report, save
from dynamo_redis.store.server import find_server

BOUNDS: dict[str, tuple[str, float, float]] = {
    "E1": (
        (
            "publish 300 B events durably, batched ÷ JetStream `publish_async` one a message"
            " (nats-server, file storage)"
        ),
        6,
        12,
    ),
    "E2": ("the same with the same batching and fsync class on both sides", 1, 1.5),
    "E3": ("consume + acknowledge, batched ÷ JetStream pull", 30, 80),
    "E4": (
        (
            "event published → applied in 4 routers, p99 at 5,000 events/s,"
            " ÷ PING round trip p99 of the same run + linger"
        ),
        6,
        3,
    ),
}
"""Each row's words, what it must reach, and what it aims at."""

Measurement = Callable[[int], dict[str, Measured]]
"""Measures some rows, in so many rounds."""

GROUPS: tuple[tuple[tuple[str, ...], Measurement], ...] = (
    (("E1", "E2"), publishing),
    (("E3",), consuming),
    (("E4",), latency),
)
"""Rows that one measurement yields."""


def main() -> None:
    """Run the suite, or the rows asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=rounds_count, default=5, help="rounds of each measurement (default 5)"
    )
    parser.add_argument("--rows", default=",".join(BOUNDS), help="ids, with commas (default: all)")
    arguments = parser.parse_args()
    wanted = set(arguments.rows.upper().split(","))
    if unknown := wanted - BOUNDS.keys():
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    logging.getLogger("dynamo_redis").setLevel(logging.ERROR)
    try:
        conditions = _conditions()
    except (RuntimeError, OSError, subprocess.CalledProcessError) as exc:
        parser.exit(1, f"{exc}\n")
    print("\n".join(conditions), flush=True)
    rows, failed = _measure(wanted, arguments.rounds)
    report("events", rows, conditions)
    if failed:
        parser.exit(1, f"could not be measured: {', '.join(failed)}\n")


def _measure(wanted: set[str], rounds: int) -> tuple[list[Row], list[str]]:
    """The rows wanted, and those that failed. What was measured is kept if the suite ends early."""
    rows: list[Row] = []
    failed: list[str] = []
    for ids, measure in GROUPS:
        if wanted.isdisjoint(ids):
            continue
        began = time.monotonic()
        try:
            measured = measure(rounds)
        except Exception:
            traceback.print_exc()
            failed += ids
            continue
        print(f"{' '.join(ids)} took {time.monotonic() - began:.0f} s", flush=True)
        rows += [_row(name, measured[name]) for name in ids if name in wanted]
        save("events", rows)
    return rows, failed


def _row(name: str, measured: Measured) -> Row:
    text, must, aim = BOUNDS[name]
    return Row(name, text, measured.ours, measured.rival, measured.ratio, must, aim, measured.rounds)


def _conditions() -> list[str]:
    """What a reader has to know to judge the figures."""
    redis = _output(find_server().path, "--version").split()[:3]
    nats = _output(nats_binary(), "--version").replace(": v", " ")
    client = _output(nats_python(), "-c", "from importlib.metadata import version; print(version('nats-py'))")
    interval = sync_interval()
    synced = f"each {interval}" if interval else "at its own interval, minutes, which this release fixes"
    return [
        (
            f"ours: {' '.join(redis)}, append-only file, appendfsync everysec"
            f" ({OURS_SYNCED_ALIKE.appendfsync} for E2); redis-py"
            f" {distribution_version('redis')}, hiredis {distribution_version('hiredis')}"
        ),
        f"rival: {nats}, JetStream with file storage, synced {synced}; nats-py {client}",
        (
            f"events of {EVENT_BYTES} B, {BATCH_COUNT} a batch; one client process a side, uvloop, loopback;"
            f" E4: {ROUTERS_COUNT} routers and a worker, each a process, {EVENTS_PER_S:,} events/s"
        ),
        f"load when started: {', '.join(f'{load:.1f}' for load in os.getloadavg())} on {os.cpu_count()} CPUs",
    ]


def _output(*command: str | os.PathLike[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
