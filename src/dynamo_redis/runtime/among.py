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


class IdsWithout(Collection[int]):
    """The ids of `LiveIds` at each moment, without some that a request must not be sent to."""

    __slots__ = ("_live", "_of", "_without", "excluded")

    def __init__(self, live: LiveIds, excluded: Collection[int]) -> None:
        self.excluded = frozenset(excluded)
        self._live = live
        self._of = live.ids
        self._without = live.ids - self.excluded

    @property
    def ids(self) -> frozenset[int]:
        """The ids now: the same object until they change."""
        if self._of is not self._live.ids:
            self._of = self._live.ids
            self._without = self._of - self.excluded
        return self._without

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self.ids

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def ids_now(among: Collection[int] | None) -> Collection[int] | None:
    """Return the ids that a request may be sent to now; None if it may be sent to any instance.

    For `LiveIds` and `IdsWithout` the result is the same object until the ids change.
    """
    return among.ids if isinstance(among, LiveIds | IdsWithout) else among
