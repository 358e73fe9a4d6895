"""Suite `index`: the router's prefix index and choice, against Dynamo's and against themselves.

Rows are measured by group; see README.md for how. `--rows X1,X2` runs some; those that do not run keep their
figures.
"""

from __future__ import annotations

import os
from importlib.metadata import version as distribution_version

import psutil

from benchmarks.harness.processes import DYNAMO
from benchmarks.harness.suite import Bounds, Groups, run_suite
from benchmarks.index.choice import choices
from benchmarks.index.restart import restart
from benchmarks.index.rivalry import rivalry
from benchmarks.index.size import million
from benchmarks.replay.share import share

BOUNDS: Bounds = {
    "X1": (
        "decode → gap check → index, blocks/s ÷ Dynamo 1.6.1 `RadixTree` binding fed its own wire",
        4,
        8,
    ),
    "X2": ("find 64 blocks, 64 workers, Dynamo binding ÷ ours", 3, 5),
    "X3": ("find 2,048 blocks, 64 workers, Dynamo binding ÷ ours", 3, 8),
    "X4": (
        ("choose a worker (hash a 4,096-token prompt, find, cost over 64 workers, book) ÷ hashing alone"),
        4,
        2.5,
    ),
    "X5": ("the same over 256 workers ÷ over 64", 4, 2.5),
    "X6": ("bytes a block, 1M blocks, 64 workers", 130, 100),
    "X7": ("snapshot of them, MB", 10, 8.5),
    "X8": ("restore ÷ building the same index from events", 0.6, 0.3),
    "X9": ("router restart → serving with the full index, 1M blocks, writers running, s", 3, 1.5),
    "X10": ("kv hit rate on the trace ÷ one omniscient router's", 0.97, 0.99),
}
"""Text, bound (`must`) and aim of each row."""

GROUPS: Groups = (
    (("X1", "X2", "X3"), rivalry),
    (("X4", "X5"), choices),
    (("X6", "X7", "X8"), million),
    (("X9",), restart),
    (("X10",), share),
)
"""The rows of each measurement."""


def main() -> None:
    """Run the suite, or the rows of the command line."""
    run_suite("index", __doc__, BOUNDS, GROUPS, lambda _, rounds: _conditions(rounds))


def _conditions(rounds: int) -> list[str]:
    """Return the conditions of the measurement that a reader needs to judge the figures."""
    libraries = (f"{name} {distribution_version(name)}" for name in ("msgpack", "xxhash"))
    memory_gib = psutil.virtual_memory().total / 2**30
    return [
        f"rival of X1 to X3: {DYNAMO}, by its Python binding, in a process of its own",
        f"ours: {', '.join(libraries)}; {rounds} rounds, in turn",
        f"{os.cpu_count()} cores, {memory_gib:.0f} GiB; load average at the start: {os.getloadavg()[0]:.2f}",
    ]


if __name__ == "__main__":
    main()
