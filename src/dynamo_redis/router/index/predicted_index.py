"""What workers hold, guessed from what was sent to them: for engines that tell nothing. Pure.

A worker that reads a prompt holds its blocks afterwards, for a while: that while is the TTL. Each prediction
names a prompt from its first block on, so that a block is never predicted without those before it, and what
expires or is given up are always ends.
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
    number: int
    ends_at: float
    worker: Worker
    hashes: array[int]


class PredictedIndex:
    """Blocks that workers should hold.

    At most `max_blocks` are kept, one that several workers should hold counted for each; past that the
    predictions of longest ago are given up, down to `prune_target_ratio` of them.
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
        # It never forgets by itself: there are no more blocks than pairs of a block and a worker.
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
        """Those that something is predicted of."""
        return list(self._latest)

    def block_counts(self) -> dict[Worker, int]:
        """How many blocks are predicted of each."""
        return {worker: len(latest) for worker, latest in self._latest.items()}

    def find(self, hashes: Sequence[int]) -> dict[Worker, Matched]:
        """How much of a prompt each worker should hold, as `KvIndex.find`."""
        return self._index.find(hashes)

    def predict(self, worker: Worker, hashes: Sequence[int], now: float) -> None:
        """A prompt, by the sequence hashes of all its whole blocks, goes to a worker. `now` never goes back.

        O(blocks), and what expired or is given up for it.
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
                self._give_up(self._log.popleft())
        self._log.append(_Prediction(self._number, now + self._ttl_s, worker, kept))
        self._logged_count += len(kept)
        self._index.apply(worker, [KvEvent(STORED, DEVICE, kept)])
        if self._logged_count > 2 * self._pair_count + _SLACK_COUNT:
            self._compact()

    def expire(self, now: float) -> int:
        """End predictions whose time has come; how many blocks that were. Amortised: each block once."""
        before = self._pair_count
        while self._log and self._log[0].ends_at <= now:
            self._give_up(self._log.popleft())
        self._index.sweep(_SWEPT_COUNT)
        return before - self._pair_count

    def remove(self, worker: Worker) -> None:
        """A worker is gone."""
        self._pair_count -= len(self._latest.pop(worker, ()))
        self._index.remove(worker)

    def _give_up(self, prediction: _Prediction) -> None:
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

    def _compact(self) -> None:
        """Leave out of the log what was predicted anew since."""
        log: deque[_Prediction] = deque()
        for number, ends_at, worker, hashes in self._log:
            latest = self._latest.get(worker, {})
            still = array("Q", [block for block in hashes if latest.get(block) == number])
            if still:
                log.append(_Prediction(number, ends_at, worker, still))
        self._log = log
        self._logged_count = sum(len(prediction.hashes) for prediction in log)
