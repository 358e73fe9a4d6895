"""A bound on the bytes of large payloads that one side of the plane holds, over all its connections.

The decoder reserves a payload's announced size before it allocates memory, and releases it when the payload
is complete. From then on the owner of the payload reserves its size: a request until it ends, or a mailbox
until the item is read.
"""

from __future__ import annotations


class PayloadBudget:
    """The bytes that all connections together hold, and their limit."""

    __slots__ = ("held_bytes", "limit_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0


class PayloadShare:
    """One connection's part of the budget: never more than the part that is free afterwards.

    A connection that reserves all it may holds half of the budget, the next connection half of the rest. As
    payloads end, the shares become equal. A further connection always finds some room.
    """

    __slots__ = ("_budget", "held_bytes")

    def __init__(self, budget: PayloadBudget) -> None:
        self._budget = budget
        self.held_bytes = 0

    def try_reserve(self, size_bytes: int) -> bool:
        """Reserve `size_bytes`; return False if they do not fit.

        A payload always fits while the budget is unused: it would otherwise never be accepted.
        """
        budget = self._budget
        if budget.held_bytes and self.held_bytes + size_bytes > budget.limit_bytes - budget.held_bytes:
            return False
        self.reserve(size_bytes)
        return True

    def reserve(self, size_bytes: int) -> None:
        """Reserve `size_bytes` even over the limit: the payload is in memory already."""
        self.held_bytes += size_bytes
        self._budget.held_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Give back `size_bytes` that were reserved."""
        self.held_bytes -= size_bytes
        self._budget.held_bytes -= size_bytes
