"""An engine's KV events and load, as it hands them to its worker: the names of
`dynamo.common.backend.publisher`. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_redis.llm.publishers import KvEventPublisher


@dataclass(frozen=True)
class ZmqSource:
    """A ZMQ socket at which the engine publishes a rank's KV events, in vLLM's form. Needs the extra
    `engines`."""

    endpoint: str
    topic: str = ""
    dp_rank: int = 0


@dataclass(frozen=True)
class PushSource:
    """A function that gets the publisher of a rank's KV events; from then on any thread may publish.

    The engine stops to publish in `cleanup`.
    """

    on_ready: Callable[[KvEventPublisher], None]
    dp_rank: int = 0


KvEventSource = ZmqSource | PushSource


@dataclass
class ComponentSnapshot:
    """The present load of one rank.

    `gpu_cache_usage` is a part of 1, as is `kv_cache_hit_rate`, which is None as long as it is not known.
    """

    kv_used_blocks: int
    kv_total_blocks: int
    gpu_cache_usage: float
    dp_rank: int
    kv_cache_hit_rate: float | None = None


class SnapshotPublisher:
    """Takes the load of an engine's ranks, for routers and `/metrics`. Any thread may publish."""

    def __init__(self, dp_ranks: Collection[int]) -> None:
        self._ranks = frozenset(dp_ranks)
        self._last: dict[int, ComponentSnapshot] = {}

    def publish(self, dp_rank: int, snapshot: ComponentSnapshot) -> None:
        """Set the load of a rank. Returns at once.

        Raises ValueError for a rank that the engine did not declare, TypeError or ValueError for values that
        are no numbers.
        """
        if dp_rank not in self._ranks:
            raise ValueError(f"dp_rank={dp_rank} is not one of component_metrics_dp_ranks")
        hit_rate = snapshot.kv_cache_hit_rate
        self._last[dp_rank] = ComponentSnapshot(
            kv_used_blocks=int(snapshot.kv_used_blocks),
            kv_total_blocks=int(snapshot.kv_total_blocks),
            gpu_cache_usage=float(snapshot.gpu_cache_usage),
            dp_rank=dp_rank,
            kv_cache_hit_rate=None if hit_rate is None else float(hit_rate),
        )

    def last(self) -> list[ComponentSnapshot]:
        """Return the last load of each rank that has published one, by rank."""
        return [snapshot for _, snapshot in sorted(self._last.copy().items())]


__all__ = ["ComponentSnapshot", "KvEventSource", "PushSource", "SnapshotPublisher", "ZmqSource"]
