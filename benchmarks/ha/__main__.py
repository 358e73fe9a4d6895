"""Suite `ha`: what users notice of a failover, and of operations on a deployment that serves.

H1  time until the registry takes writes again after a Sentinel has named the new primary (`sentinel_kill`)
H2  chats that fail meanwhile; keys that are missing, extra, or shown and not there
H3  time until the registry takes writes again after the replica of a cluster's dead master has taken over
H4  chats that fail, and watch events that are lost, while slots of a cluster move (`cluster_faults`)
H5  routing decisions made blind while two routers restart one after the other (`router_restarts`)
H6  `dynamo-redis doctor` on a healthy server, the whole command (`doctor`)

The worst of all rounds counts: a median would hide a bad one. `--rounds` should be 10 or more; each round has
a seed of its own, by which the moment of the kill is drawn. `--rows H1,H2` runs some.
"""

from __future__ import annotations

from benchmarks.ha.cluster_faults import master_kills, slot_moves
from benchmarks.ha.doctor import doctor_runs
from benchmarks.ha.router_restarts import router_restarts
from benchmarks.ha.sentinel_kill import sentinel_kills
from benchmarks.harness.suite import Bounds, Groups, run_suite

BOUNDS: Bounds = {
    "H1": ("sentinel failover by kill -9: registry writable again after detection +, s", 1.5, 0.5),
    "H2": ("the same: chats failed; keys missing, extra, phantom", [0, 0], [0, 0]),
    "H3": (
        "cluster, one master killed: registry writable again after the replica took over +, s",
        1.5,
        0.5,
    ),
    "H4": ("cluster, slots moved under load: chats failed; watch events lost", [0, 0], [0, 0]),
    "H5": (
        (
            "routing decisions made blind (no index for a worker that lives) of 2,000 while both routers"
            " restart one after the other"
        ),
        12,
        0,
    ),
    "H6": ("`doctor` on a healthy server, s", 2.0, 0.5),
}
"""Text, bound (`must`) and aim of each row."""

GROUPS: Groups = (
    (("H1", "H2"), sentinel_kills),
    (("H3",), master_kills),
    (("H4",), slot_moves),
    (("H5",), router_restarts),
    (("H6",), doctor_runs),
)
"""The rows of each measurement."""


def main() -> None:
    """Run the suite, or the rows of the command line."""
    run_suite("ha", __doc__, BOUNDS, GROUPS, _conditions, default_rounds=10)


def _conditions(_: set[str], rounds: int) -> list[str]:
    """Return the conditions of the measurement that a reader needs to judge the figures."""
    return [
        f"worst of {rounds} seeded rounds",
        "Redis Sentinel with 3 sentinels, a primary and 2 replicas",
        "a cluster of 3 masters with a replica each",
    ]


if __name__ == "__main__":
    main()
