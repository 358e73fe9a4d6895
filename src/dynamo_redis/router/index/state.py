"""What a router knows of its workers' caches, and how it came to know, as numbers for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dynamo_redis.router.index.snapshotter import StoredSnapshot


@dataclass(frozen=True, slots=True)
class IndexerState:
    """An indexer as it stands. Counts are since its start."""

    mode: str
    """`stream` or `pubsub`."""
    connected: bool
    """Whether events can be read."""
    disconnected_s: float
    """How long they cannot; 0 while they can."""
    caught_up: bool
    """Whether they can, and all has been read that was there at the start."""
    block_count: int
    worker_count: int
    position: str | None
    """The last entry that was applied; None without a stream."""
    lag_count: int | None
    """Entries that are not applied yet, when last looked; None if unknown, as while they cannot be read."""
    lag_s: float | None
    """By how much the newest entry is younger than the last that was applied; None likewise."""
    snapshot: StoredSnapshot | None
    snapshots_stored_count: int
    events_count: int
    repeated_count: int
    unreadable_count: int
    """Entries that are no batch of events."""
    gaps_count: int
    """Times that something was missing of a worker."""
    cut_off_count: int
    """Times that the stream, or its unread part, was gone, or the subscription broke."""
    recovered_count: int
    """Times that a worker said what it holds."""
    unanswered_count: int
    """Times that it did not."""
    asking: tuple[str, ...]
    """Instances that an answer is awaited from, in hexadecimal."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)
