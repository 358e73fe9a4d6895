"""The ids of the instances that a request may be sent to, if not all of the endpoint's. Pure.

A request may wait in a queue, and is sent to another instance after a failure. A set of ids that is fixed at
its start gets stale meanwhile: the request would never reach an instance that was added later. `LiveIds` are
read anew for each choice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator


class LiveIds(Collection[int]):
    """A set of ids that its owner may replace. Two of them are equal only if they are the same object."""

    __slots__ = ("ids",)

    def __init__(self) -> None:
        self.ids: frozenset[int] = frozenset()

    def set(self, ids: frozenset[int]) -> None:
        """Replace the ids."""
        if ids != self.ids:
            self.ids = ids

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self.ids

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"<LiveIds {sorted(self.ids)}>"


def ids_now(among: Collection[int] | None) -> Collection[int] | None:
    """Return the ids that a request may be sent to now; None if it may be sent to any instance.

    For `LiveIds` the result is the same object until the ids change.
    """
    return among.ids if isinstance(among, LiveIds) else among
