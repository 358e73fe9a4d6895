"""KV events as they travel: blocks that a worker's KV cache has stored or removed. Pure.

An event is a msgpack array `[kind, tier, hashes]`: hashes are sequence hashes (`block_hashes.py` of
`events/`), each as eight bytes, little-endian, in one binary. The worker translates its engine's block names
into these hashes, so a router neither computes hashes nor keeps engines' names.

`REMOVED_INSIDE` removes blocks while blocks that follow them stay: for a while that worker may hold the end
of a prefix without its middle. Plain `REMOVED` promises that no following block stays. `REMOVED_INSIDE` also
goes before the `STORED` of a block whose predecessor is not on its tier; then it names blocks that were not
held.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from dynamo_redis.errors import InvalidRecord

STORED: Final = 0
REMOVED: Final = 1
REMOVED_INSIDE: Final = 2
CLEARED: Final = 3
"""The rank's whole cache, on all tiers, is empty."""

DEVICE: Final = 0
HOST: Final = 1
DISK: Final = 2
TIERS: Final = (DEVICE, HOST, DISK)

_BLANK: Final = array("Q")
_WHAT: Final = "a KV event"


class KvEvent(NamedTuple):
    """One event, checked. `hashes` (u64) is empty for CLEARED."""

    kind: int
    tier: int
    hashes: array[int]

    def to_wire(self) -> list[Any]:
        """Return the event as it stands in a batch."""
        hashes = self.hashes
        if sys.byteorder == "big":
            hashes = array("Q", hashes)
            hashes.byteswap()
        return [self.kind, self.tier, hashes.tobytes()]


def stored(hashes: Iterable[int], tier: int = DEVICE) -> KvEvent:
    """Make the event of blocks that are held now, in the order in which they follow each other; in a dump in
    any order."""
    return KvEvent(STORED, tier, array("Q", hashes))


def removed(hashes: Iterable[int], tier: int = DEVICE, *, inside: bool = False) -> KvEvent:
    """Make the event of blocks that are held no longer; `inside`: blocks that follow them still are."""
    return KvEvent(REMOVED_INSIDE if inside else REMOVED, tier, array("Q", hashes))


def cleared() -> KvEvent:
    """Make the event of an emptied cache."""
    return KvEvent(CLEARED, DEVICE, _BLANK)


def read_kv_events(events: Sequence[Any]) -> list[KvEvent]:
    """Check the events of a batch, and return them with neighbours of one kind and tier joined.

    Kinds and tiers of later releases are left out. Raises InvalidRecord if one is not a KV event: then no
    event of the batch may be applied.
    """
    runs: list[tuple[int, int, list[bytes]]] = []
    kind_before = tier_before = object()
    run: list[bytes] = []
    for event in events:
        if type(event) is not list or len(event) < 3:
            raise InvalidRecord(_WHAT, "no array of three")
        kind, tier, content = event if len(event) == 3 else event[:3]
        if type(content) is not bytes:
            raise InvalidRecord(_WHAT, "a part is of the wrong type")
        if len(content) % 8:
            raise InvalidRecord(_WHAT, f"hashes of {len(content)} bytes")
        if kind is not kind_before or tier is not tier_before:  # small integers are one object each
            if type(kind) is not int or type(tier) is not int:
                raise InvalidRecord(_WHAT, "a part is of the wrong type")
            kind_before, tier_before, run = kind, tier, []
            if STORED <= kind <= CLEARED and tier in TIERS:
                runs.append((kind, tier, run))
        run.append(content)
    found: list[KvEvent] = []
    for kind, tier, contents in runs:
        hashes = array("Q", b"".join(contents))
        if sys.byteorder == "big":
            hashes.byteswap()
        found.append(KvEvent(kind, tier, hashes))
    return found
