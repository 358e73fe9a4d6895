"""Suite `events`: how fast events are published, consumed and applied, against JetStream.

Rows are measured by group; see README.md for how. `--rows E1,E2` runs some; those that do not run keep their
figures.
"""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import version as distribution_version

from benchmarks.events.jetstream import nats_binary, nats_python, sync_interval
from benchmarks.events.latency import EVENTS_PER_S, ROUTERS_COUNT, latency
from benchmarks.events.rates import OURS_SYNCED_ALIKE, consuming, publishing, publishing_alike
from benchmarks.events.workload import BATCH_COUNT, EVENT_BYTES
from benchmarks.harness.suite import Bounds, Groups, run_suite
from dynamo_redis.store.server import find_server

BOUNDS: Bounds = {
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
"""Text, bound (`must`) and aim of each row."""

GROUPS: Groups = (
    (("E1",), publishing),
    (("E2",), publishing_alike),
    (("E3",), consuming),
    (("E4",), latency),
)
"""The rows of each measurement."""


def main() -> None:
    """Run the suite, or the rows of the command line."""
    run_suite(
        "events",
        __doc__,
        BOUNDS,
        GROUPS,
        lambda *_: _conditions(),
        unavailable=(RuntimeError, OSError, subprocess.CalledProcessError),
    )


def _conditions() -> list[str]:
    """Return the conditions of the measurement that a reader needs to judge the figures."""
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
