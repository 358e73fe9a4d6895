"""The workloads of suite `request`. The rivals import it as well, so it uses no third-party package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["echo", "burst", "tick"]
"""`echo` answers with the request; `burst` with `ITEMS` items from a generator that never suspends; `tick`
with the same, one turn of the event loop before each, as an engine does."""

KINDS: Final[tuple[Kind, ...]] = ("echo", "burst", "tick")
ITEMS: Final = 200
ITEM_BYTES: Final = 100
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Workload:
    """A load of `concurrency` callers, each of which sends the next request as soon as it has its answer.

    `size_bytes` is the size of the request and the answer of an `echo`. An answer counts for `units` of
    `unit`.
    """

    name: str
    kind: Kind
    concurrency: int
    unit: str = "requests"
    units: int = 1
    size_bytes: int = 128


_ALL = (
    Workload("unary c=1", "echo", 1),
    Workload("unary c=64", "echo", 64),
    Workload("unary c=256", "echo", 256),
    Workload("burst", "burst", 32, "items", ITEMS),
    Workload("tick", "tick", 32, "items", ITEMS),
    Workload("echo 1 MiB", "echo", 4, "MiB", 1, MIB),
    Workload("echo 8 MiB", "echo", 2, "MiB", 8, 8 * MIB),
)

WORKLOADS: Final = {workload.name: workload for workload in _ALL}
"""By name, in the order in which they run."""
