"""How many bytes of large payloads one side of the plane holds, over all its connections.

The decoder takes a payload's announced size before there is memory for it, and gives it back when the
payload is complete. From then on whoever keeps the payload holds it: the request it belongs to, until that
ends; the mailbox it waits in, until it is read.
"""

from __future__ import annotations


class PayloadBudget:
    """What is held, by all connections together, of what may be."""

    __slots__ = ("held_bytes", "limit_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0


class PayloadShare:
    """One connection's part of the budget: never more than what it leaves for others.

    So a connection that takes all it gets holds half, the next one half of the rest; as payloads end, their
    shares draw level. There is always something for one more.
    """

    __slots__ = ("_budget", "held_bytes")

    def __init__(self, budget: PayloadBudget) -> None:
        self._budget = budget
        self.held_bytes = 0

    def take(self, size_bytes: int) -> bool:
        """Take so much, if it is there. A payload that is alone always fits: it would wait for ever."""
        budget = self._budget
        if budget.held_bytes and self.held_bytes + size_bytes > budget.limit_bytes - budget.held_bytes:
            return False
        self.hold(size_bytes)
        return True

    def hold(self, size_bytes: int) -> None:
        """Take so much, whether it is there or not: it is in memory already."""
        self.held_bytes += size_bytes
        self._budget.held_bytes += size_bytes

    def give(self, size_bytes: int) -> None:
        """Give so much back."""
        self.held_bytes -= size_bytes
        self._budget.held_bytes -= size_bytes
