"""The blocks that workers should hold, by the prompts that were sent to them: for engines that publish no KV
events. Pure.

A worker that has read a prompt is taken to hold its blocks for the TTL. Each prediction names a prompt from
its first block on. So a block is never predicted without those before it, and predictions that expire or are
dropped take blocks from the ends of prefixes.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from dynamo_redis.router.base import Matched, Worker
from dynamo_redis.router.index.prefix_index import MAX_BLOCKS, PRUNE_TARGET_RATIO, KvIndex
from dynamo_redis.wire.kv_event import DEVICE, REMOVED, STORED, KvEvent

_SLACK_COUNT = 4096
_SWEPT_COUNT = 4096


class _Prediction(NamedTuple):
    """A prompt that was sent to a worker. `hashes` are the sequence hashes of its blocks."""

    number: int
    ends_at: float
    worker: Worker
    hashes: array[int]


class PredictedIndex:
    """Blocks that workers should hold.

    At most `max_blocks` are kept; a block that several workers should hold counts for each. Past that the
    oldest predictions are dropped, until `prune_target_ratio` of the bound are left.
    """

    def __init__(
        self,
        *,
        ttl_s: float = 120.0,
        max_blocks: int = MAX_BLOCKS,
        prune_target_ratio: float = PRUNE_TARGET_RATIO,
    ) -> None:
        self._ttl_s = ttl_s
        self._max_blocks = max_blocks
        self._target_blocks = int(max_blocks * prune_target_ratio)
        # It forgets nothing by itself: it has no more blocks than there are pairs of a block and a worker.
        self._index = KvIndex(max_blocks=max_blocks)
        self._latest: dict[Worker, dict[int, int]] = {}
        self._log: deque[_Prediction] = deque()
        self._logged_count = 0
        self._number = 0
        self._pair_count = 0

    @property
    def block_count(self) -> int:
        """Blocks predicted, counted for each worker."""
        return self._pair_count

    def workers(self) -> list[Worker]:
        """Return the workers with predicted blocks."""
        return list(self._latest)

    def block_counts(self) -> dict[Worker, int]:
        """Return the number of blocks predicted for each worker."""
        return {worker: len(latest) for worker, latest in self._latest.items()}

    def find(self, hashes: Sequence[int]) -> dict[Worker, Matched]:
        """Return how much of a prompt each worker should hold, as `KvIndex.find`."""
        return self._index.find(hashes)

    def predict(self, worker: Worker, hashes: Sequence[int], now: float) -> None:
        """Note that a prompt goes to a worker. `hashes` are the sequence hashes of all its whole blocks;
        `now` never goes back.

        O(blocks), and O(blocks) of the predictions that have expired or are dropped for it.
        """
        self.expire(now)
        kept = array("Q", hashes[: self._max_blocks])
        if not kept:
            return
        self._number += 1
        latest = self._latest.setdefault(worker, {})
        known = len(latest)
        latest.update(dict.fromkeys(kept, self._number))
        self._pair_count += len(latest) - known
        if self._pair_count > self._max_blocks:
            while self._pair_count > self._target_blocks and self._log:
                self._drop(self._log.popleft())
        self._log.append(_Prediction(self._number, now + self._ttl_s, worker, kept))
        self._logged_count += len(kept)
        self._index.apply(worker, [KvEvent(STORED, DEVICE, kept)])
        if self._logged_count > 2 * self._pair_count + _SLACK_COUNT:
            # Leave out of the log the blocks that a later prediction has named again.
            log: deque[_Prediction] = deque()
            for number, ends_at, of, logged in self._log:
                latest = self._latest.get(of, {})
                still = array("Q", [block for block in logged if latest.get(block) == number])
                if still:
                    log.append(_Prediction(number, ends_at, of, still))
            self._log = log
            self._logged_count = sum(len(prediction.hashes) for prediction in log)

    def expire(self, now: float) -> int:
        """End the predictions whose TTL is over; return the number of their blocks. Amortised O(1) a
        block."""
        before = self._pair_count
        while self._log and self._log[0].ends_at <= now:
            self._drop(self._log.popleft())
        self._index.sweep(_SWEPT_COUNT)
        return before - self._pair_count

    def remove(self, worker: Worker) -> None:
        """Forget a worker that is gone, or has emptied its cache."""
        self._pair_count -= len(self._latest.pop(worker, ()))
        self._index.remove(worker)

    def _drop(self, prediction: _Prediction) -> None:
        """Remove the blocks of a prediction that no later one has named again."""
        number, _, worker, hashes = prediction
        self._logged_count -= len(hashes)
        latest = self._latest.get(worker)
        if latest is None:
            return
        over = array("Q", [block for block in hashes if latest.get(block) == number])
        for block in over:
            del latest[block]
        self._pair_count -= len(over)
        self._index.apply(worker, [KvEvent(REMOVED, DEVICE, over)])
        if not latest:
            del self._latest[worker]
            self._index.remove(worker)
