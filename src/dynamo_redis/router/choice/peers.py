"""The other routers that read this one's bookings: those in the registry, and those that were heard.

A router that has none need not say anything. Pure.
"""

from __future__ import annotations

from math import inf

from dynamo_redis.clock import Clock


class Peers:
    """By the names of routers. One that vanished from the registry's view without having left, or is heard
    and not listed, counts for `doubt_s` more."""

    def __init__(self, clock: Clock, doubt_s: float) -> None:
        self._clock = clock
        self._doubt_s = doubt_s
        self._until: dict[str, float] = {}
        self._heard: set[str] = set()

    def __bool__(self) -> bool:
        """Whether there are any."""
        now = self._clock.monotonic()
        return any(until > now for until in self._until.values())

    def listed(self, owner: str) -> bool:
        """The registry has it. Answers whether that is new."""
        is_new = self._until.get(owner) != inf
        self._until[owner] = inf
        return is_new

    def missed(self, owner: str) -> None:
        """The registry has it no more, but may have lost it."""
        if owner in self._until:
            self._until[owner] = self._clock.monotonic() + self._doubt_s

    def left(self, owner: str) -> None:
        """It has left, or does not listen."""
        self._until.pop(owner, None)
        self._heard.discard(owner)

    def heard(self, owner: str) -> None:
        """It has said something."""
        until = self._until.get(owner)
        if until is None:
            self._forget_the_old()
        self._heard.add(owner)
        if until != inf:
            self._until[owner] = self._clock.monotonic() + self._doubt_s

    def _forget_the_old(self) -> None:
        """The last words of a router often come after its record has gone: it would be kept for ever."""
        now = self._clock.monotonic()
        for owner in [owner for owner, until in self._until.items() if until <= now]:
            self.left(owner)

    def all_heard(self) -> bool:
        """Whether each that is listed has said something."""
        return all(owner in self._heard for owner, until in self._until.items() if until == inf)
