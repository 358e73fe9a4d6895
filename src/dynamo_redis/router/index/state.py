"""The state of an indexer, in numbers for operators."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dynamo_redis.router.index.snapshotter import StoredSnapshot


@dataclass(frozen=True, slots=True)
class IndexerState:
    """The present state of an indexer. Counts are since its start."""

    mode: str
    """`stream` or `pubsub`."""
    connected: bool
    """True while events can be read."""
    disconnected_s: float
    """Seconds for which events could not be read; 0 while they can."""
    caught_up: bool
    """True while events can be read, and all have been read that were there at the start."""
    block_count: int
    worker_count: int
    position: str | None
    """The entry applied last, of each shard; None without a stream."""
    lag_count: int | None
    """Entries that were not applied yet at the last measurement; None if unknown, and while disconnected."""
    lag_s: float | None
    """Seconds between the entry applied last and the newest one; None as `lag_count`."""
    snapshot: StoredSnapshot | None
    snapshots_stored_count: int
    events_count: int
    repeated_count: int
    unreadable_count: int
    """Entries that are no batch of events."""
    gaps_count: int
    """Gaps found in the events of a worker."""
    cut_off_count: int
    """Times that the stream, or its unread part, was gone, or the subscription broke."""
    recovered_count: int
    """Asks that a worker answered."""
    unanswered_count: int
    """Asks that a worker did not answer."""
    asking: tuple[str, ...]
    """Instances that have been asked and have not answered yet, in hexadecimal."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        fields = asdict(self)
        if self.snapshot is not None:
            del fields["snapshot"]["positions"]
            fields["snapshot"]["position"] = self.snapshot.position
        return fields
