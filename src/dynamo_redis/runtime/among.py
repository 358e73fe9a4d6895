"""The instances that a request may go to, where not all of an endpoint's will do. Pure.

A request may wait for its turn, and go to another instance after a failure. Ids that are fixed when it begins
grow old meanwhile: it would never go to an instance that came later. `LiveIds` are looked at for each choice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator


class LiveIds(Collection[int]):
    """The ids as they are now. Two of them are never equal, whatever they hold."""

    __slots__ = ("ids",)

    def __init__(self) -> None:
        self.ids: frozenset[int] = frozenset()

    def set(self, ids: frozenset[int]) -> None:
        """From now on these."""
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
    """Return the ids that a request may go to now; None if it may go to any. The same object until they
    change, if they are live."""
    return among.ids if isinstance(among, LiveIds) else among
