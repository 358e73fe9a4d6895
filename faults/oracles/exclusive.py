"""What several processes want and one may have: ports, and parts in barriers."""

from __future__ import annotations

from faults.history import History
from faults.oracles import barriers, ports
from faults.oracles.violation import Violation


def check(history: History) -> list[Violation]:
    """Both of a run."""
    return [*ports.check(history), *barriers.check(history)]
