"""The promises that must hold of every run's history. Each oracle is a pure function from a history to its
violations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from faults.history import History
from faults.oracles.chats import check as check_chats
from faults.oracles.exclusive import check as check_exclusive
from faults.oracles.keys import check as check_keys
from faults.oracles.linear import check as check_linear
from faults.oracles.lock import check as check_lock
from faults.oracles.members import check as check_members
from faults.oracles.objects import check as check_objects
from faults.oracles.served import check as check_served
from faults.oracles.violation import Violation
from faults.oracles.watch import check as check_watch

ORACLES: Final[dict[str, Callable[[History], list[Violation]]]] = {
    "watch": check_watch,
    "linear": check_linear,
    "keys": check_keys,
    "lock": check_lock,
    "objects": check_objects,
    "chats": check_chats,
    "members": check_members,
    "exclusive": check_exclusive,
    "served": check_served,
}
"""All oracles, by name."""
