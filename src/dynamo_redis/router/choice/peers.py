"""The other routers that read this one's bookings: those in the registry, and those that sent a message.

A router without peers need not send its bookings. Pure.
"""

from __future__ import annotations

from math import inf

from dynamo_redis.clock import Clock


class Peers:
    """The names of the other routers.

    A router whose record vanished in a resync, and one that sent a message and has no record, count for
    `grace_s` more.
    """

    def __init__(self, clock: Clock, grace_s: float) -> None:
        self._clock = clock
        self._grace_s = grace_s
        self._until: dict[str, float] = {}
        self._heard: set[str] = set()

    def __bool__(self) -> bool:
        """True if there are other routers."""
        now = self._clock.monotonic()
        return any(until > now for until in self._until.values())

    def note_listed(self, owner: str) -> bool:
        """Note that the registry lists a router; return True if that is new."""
        is_new = self._until.get(owner) != inf
        self._until[owner] = inf
        return is_new

    def note_vanished(self, owner: str) -> None:
        """Note that the registry lists a router no more, but may have lost its record."""
        if owner in self._until:
            self._until[owner] = self._clock.monotonic() + self._grace_s

    def remove(self, owner: str) -> None:
        """Remove a router that has left, or does not read bookings."""
        self._until.pop(owner, None)
        self._heard.discard(owner)

    def note_heard(self, owner: str) -> None:
        """Note that a router has sent a message."""
        now = self._clock.monotonic()
        until = self._until.get(owner)
        if until is None:
            # A router's last messages often come after its record has gone, and nothing else would remove it.
            for old in [old for old, old_until in self._until.items() if old_until <= now]:
                self.remove(old)
        self._heard.add(owner)
        if until != inf:
            self._until[owner] = now + self._grace_s

    def all_heard(self) -> bool:
        """Return whether each router that the registry lists has sent a message."""
        return all(owner in self._heard for owner, until in self._until.items() if until == inf)
