"""Exclusive resources, which several processes want and one may have: ports, and parts in barriers."""

from __future__ import annotations

from faults.history import History
from faults.oracles import barriers, ports
from faults.oracles.violation import Violation


def check(history: History) -> list[Violation]:
    """Check the ports and the barriers of a run."""
    return [*ports.check(history), *barriers.check(history)]
