"""Keeps an index equal to the workers' caches, whatever is lost or repeated on the way.

The parts: `followers` read events, `ledger` applies each exactly once and finds gaps, `recovery` asks
workers, `members` follows the instances that the registry lists, `snapshotter` stores the index. `Indexer`
puts them together.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, Final

from dynamo_redis.backoff import Backoff
from dynamo_redis.config import RouterSettings
from dynamo_redis.errors import InvalidRecord, StoreError, StoreUnavailable
from dynamo_redis.events.shards import kv_event_streams
from dynamo_redis.names import format_instance_id
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.router.base import Matched, Worker
from dynamo_redis.router.index.followers import SnapshotStart, StreamFollower, TopicFollower
from dynamo_redis.router.index.ledger import Ledger, Outcome
from dynamo_redis.router.index.members import Members
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.router.index.recovery import OnBlockSize, Recovery
from dynamo_redis.router.index.snapshot import IndexSnapshot, decode_snapshot
from dynamo_redis.router.index.snapshotter import Snapshots, Snapshotter, StoredSnapshot, positions_text
from dynamo_redis.router.index.state import IndexerState
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.store.event_base import EntryId, StreamName, entry_order
from dynamo_redis.supervision import Supervisor
from dynamo_redis.wire.event import EventBatch
from dynamo_redis.wire.topics import KV_DUMP, KV_EVENTS

log = logging.getLogger(__name__)

START_S: Final = 10.0
"""Longest time that `start` waits until the earlier events have been read."""

VERIFY_S: Final = 1.0
"""Time from the start until all workers are asked, jittered."""

_ANSWERS_S: Final = 2.0
"""Longest time that `start` then waits for the answers of workers."""

_SWEEP_COUNT: Final = 4096
_KEEP_S: Final = 1.0
_LAG_S: Final = 2.0


_Lag = tuple[int | None, float | None]
"""Entries and seconds by which the index is behind the stream; None if unknown."""


class Indexer:
    """The index of one component's workers, and the tasks that keep it.

    One task follows the events of each shard, one follows the members, one frees memory and measures the lag,
    one stores snapshots, and one more runs for each worker that is asked. All end with `aclose`. For one
    event loop.

    While Redis is away the index stays as it is. `find` is synchronous, and never waits.
    """

    def __init__(
        self,
        runtime: DistributedRuntime,
        namespace: str,
        component: str,
        settings: RouterSettings,
        *,
        router_id: str,
        on_block_size: OnBlockSize | None = None,
    ) -> None:
        """`router_id` is the name of the consumer group: another one for each start of each router.
        `on_block_size` is called with the block size of each worker that answers an ask."""
        self.router_id = router_id
        self._settings = settings
        self._mode = runtime.settings.events.event_plane
        self._on_block_size = on_block_size
        self._runtime = runtime
        self._streams = runtime.events
        self._shards = kv_event_streams(namespace, component, runtime.settings.events)
        self._stream = StreamName(namespace, component, KV_EVENTS)
        self._workers = f"{namespace}.{component}.{KV_DUMP}"
        self._ledger = Ledger(
            KvIndex(
                max_blocks=settings.router_max_tree_size,
                prune_target_ratio=settings.router_prune_target_ratio,
            )
        )
        decode = partial(
            decode_snapshot,
            max_blocks=settings.router_max_tree_size,
            prune_target_ratio=settings.router_prune_target_ratio,
        )
        self._snapshots = Snapshots(
            runtime.objects, runtime.locks, self._streams, self._shards, decode=decode
        )
        self._snapshotter = Snapshotter(
            self._snapshots,
            self._take_snapshot,
            lambda timeout_s: self._recovery.wait_until_idle(timeout_s),
            settings.router_snapshot_threshold,
        )
        self._followers: Sequence[StreamFollower | TopicFollower]
        if self._mode == "pubsub":
            self._followers = [TopicFollower(self._streams, self._stream, self)]
        else:
            begin = SnapshotStart(self._snapshotter.load, self)
            self._followers = [
                StreamFollower(self._streams, shard, router_id, self, begin) for shard in self._shards
            ]
        self._client: Client | None = None
        self._recovery: Recovery
        self._members: Members
        self._tasks: list[asyncio.Task[None]] = []
        self._behind = set(range(len(self._shards)))
        """The shards whose earlier events have not been read yet."""
        self._has_caught_up = asyncio.Event()
        self._lag: _Lag = (None, None)
        self._whole_among: tuple[set[int], int, bool] = (set(), -1, False)
        self._supervisor = Supervisor(log, f"index of {self._stream.path}")
        self._gaps_count = 0
        self._unreadable_count = 0
        self._complaints = RateLimitedLog(log)

    def __repr__(self) -> str:
        return f"<Indexer {self._stream.path}: {self.index.block_count} blocks>"

    # ----------------------------------------------------------------- lifetime

    async def start(self) -> None:
        """Return when the earlier events have been read, and workers that were not known have answered.

        It returns after `START_S` and some seconds at the latest: the index then goes on to heal. Raises
        StoreError if the workers cannot be listed for `START_S`.
        """

        async def follow() -> None:
            """Reset the stored states if that is wanted, then follow the events."""
            is_reset = not self._settings.router_reset_states or self._mode != "stream"
            backoff = Backoff()
            while not is_reset:
                try:
                    await self._snapshots.reset()
                except StoreError as exc:
                    log.warning("snapshot and stream of %s are not reset yet: %s", self._stream.path, exc)
                    await asyncio.sleep(backoff.next_s())
                else:
                    log.info("snapshot and stream of %s are reset", self._stream.path)
                    is_reset = True
            await asyncio.gather(*(follower.run() for follower in self._followers))

        until = time.monotonic() + START_S
        backoff = Backoff()
        while self._client is None:
            try:
                self._client = await self._runtime.endpoint(self._workers).client()
            except StoreUnavailable:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(backoff.next_s())
        self._recovery = Recovery(
            self._ledger, self._client, self._mode, self._on_block_size, shards_count=len(self._shards)
        )
        self._members = Members(self._ledger, self._recovery, self._client)
        self._members.start()
        self._spawn(follow(), "follow KV events")
        self._spawn(self._supervisor.run(self._keep), "keep KV index")
        if self._mode == "stream":
            self._snapshotter.start()
        try:
            async with asyncio.timeout(START_S):
                await self._has_caught_up.wait()
            await self._recovery.wait_until_idle(_ANSWERS_S)
        except TimeoutError:
            log.warning("%r serves with the blocks that it knows: earlier events cannot be read yet", self)

    async def aclose(self) -> None:
        """End all tasks and leave the stream. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        client, self._client = self._client, None
        if client is not None:
            await self._snapshotter.aclose()
            await self._members.aclose()
            await self._recovery.aclose()
            await asyncio.gather(*(follower.aclose() for follower in self._followers))
            await client.aclose()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task that ends only by cancellation. A defect that ends it is logged."""

        def log_failure(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (exc := task.exception()) is not None:
                log.error("%s has failed", task.get_name(), exc_info=exc)

        task = asyncio.create_task(work, name=f"{name} of {self._stream.path}")
        task.add_done_callback(log_failure)
        self._tasks.append(task)

    # ----------------------------------------------------------------- the index

    @property
    def index(self) -> KvIndex:
        """The present index. Another object may take its place until `start` returns."""
        return self._ledger.index

    def find(self, hashes: Sequence[int]) -> dict[Worker, Matched]:
        """As `KvIndex.find`."""
        return self._ledger.index.find(hashes)

    def is_whole(self) -> bool:
        """Return whether the earlier events have been read, and the blocks of each listed worker are known.

        Cheap enough for each choice: the workers are compared only after a change.
        """
        if self._client is None or not self._has_caught_up.is_set():
            return False
        listed, version = self._members.listed, self._ledger.whole_version
        seen, seen_version, is_whole = self._whole_among
        if listed is not seen or version != seen_version:
            is_whole = listed <= self._ledger.whole
            self._whole_among = listed, version, is_whole
        return is_whole

    def state(self) -> IndexerState:
        """Return the present state, for `router-state` and metrics."""
        is_running = self._client is not None
        recovery = self._recovery if is_running else None
        is_connected = all(follower.connected for follower in self._followers)
        lag_count, lag_s = self._lag if is_connected else (None, None)
        positions = self._positions()
        return IndexerState(
            mode=self._mode,
            connected=is_connected,
            disconnected_s=round(max(follower.disconnected_s for follower in self._followers), 3),
            caught_up=is_connected and self._has_caught_up.is_set(),
            block_count=self.index.block_count,
            worker_count=len(self.index.workers()),
            position=positions_text(positions) if positions else None,
            lag_count=lag_count,
            lag_s=lag_s,
            snapshot=self._snapshotter.last,
            snapshots_stored_count=self._snapshotter.stored_count,
            events_count=self._ledger.applied_count,
            repeated_count=self._ledger.repeated_count,
            unreadable_count=self._unreadable_count,
            gaps_count=self._gaps_count,
            cut_off_count=sum(follower.cut_off_count for follower in self._followers),
            recovered_count=recovery.recovered_count if recovery else 0,
            unanswered_count=recovery.failed_count if recovery else 0,
            asking=tuple(format_instance_id(i) for i in recovery.asking()) if recovery else (),
        )

    async def save_snapshot(self) -> StoredSnapshot:
        """Store a snapshot now and trim the stream, unless the stored one is young enough. Raises StoreError;
        LockNotAcquired if another router is storing one."""
        return await self._snapshotter.save()

    # ----------------------------------------------------------------- the intake of the follower

    def apply(self, content: bytes) -> int:
        """As `Intake.apply`. A gap before a batch has its worker asked; a batch that cannot be read, all."""
        try:
            batch = EventBatch.from_bytes(content)
            if batch.topic != KV_EVENTS:
                raise InvalidRecord("a batch of KV events", f"its topic is {batch.topic!r}")
        except InvalidRecord as exc:
            self._unreadable_count += 1
            self._complaints.log(
                "an entry of %s cannot be read, asking all workers: %s", self._stream.path, exc
            )
            self._recovery.ask_all()
            return 0
        if self._ledger.apply(batch) is Outcome.MISSING:
            self._gaps_count += 1
            self._members.recover(batch.publisher.instance_id)
        return len(batch.events)

    def note_applied(self, shard: int, position: EntryId, event_count: int) -> None:
        """As `Intake.note_applied`."""
        self._snapshotter.note_applied(shard, position, event_count)

    def restore(self, snapshot: IndexSnapshot) -> None:
        """As `Intake.restore`."""
        self._ledger.restore(snapshot.index, snapshot.publishers)

    def note_possible_loss(self) -> None:
        """As `Intake.note_possible_loss`."""
        self._recovery.ask_all()

    def note_caught_up(self, shard: int) -> None:
        """As `Intake.note_caught_up`. What follows waits for all shards."""
        self._behind.discard(shard)
        if not self._behind and not self._has_caught_up.is_set():
            self._members.note_caught_up()
            # A worker's process may have been replaced since the snapshot was taken. That is rare, so the
            # workers are asked a little later, when requests are served already. The time is random, since
            # routers may start together.
            self._recovery.ask_all(after_s=VERIFY_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
            self._has_caught_up.set()

    # ----------------------------------------------------------------- snapshots

    def _take_snapshot(self) -> IndexSnapshot:
        """Return the present index, as a snapshot to store."""
        return IndexSnapshot(self._positions(), self._ledger.exact(), self._ledger.index)

    def _positions(self) -> tuple[EntryId, ...]:
        """Return the entry applied last of each shard; nothing without streams."""
        return tuple(one.position for one in self._followers if isinstance(one, StreamFollower))

    # ----------------------------------------------------------------- tasks

    async def _keep(self) -> None:
        """Free the memory of workers that are gone, and measure the lag: the entries and seconds by which
        this router's group is behind the stream's end."""
        measured_at = 0.0
        while True:
            has_more = self.index.sweep(_SWEEP_COUNT)
            await asyncio.sleep(0 if has_more else _KEEP_S)
            if self._mode != "stream" or time.monotonic() - measured_at <= _LAG_S:
                continue
            measured_at = time.monotonic()
            lags = [
                await self._shard_lag(shard, position)
                for shard, position in zip(self._shards, self._positions(), strict=True)
            ]
            known = [lag for lag in lags if lag is not None]
            if len(known) < len(lags):
                self._lag = None, None
            else:
                self._lag = sum(count for count, _ in known), max(seconds for _, seconds in known)

    async def _shard_lag(self, shard: StreamName, position: EntryId) -> tuple[int, float] | None:
        """Return the entries and seconds by which this router's group is behind a shard's end; None if that
        cannot be read."""
        try:
            info = await self._streams.info(shard)
        except StoreError:
            info = None
        groups = info.groups if info else ()
        group = next((group for group in groups if group.name == self.router_id), None)
        if info is None or group is None:
            return None
        behind_ms = entry_order(info.last_entry_id)[0] - entry_order(position)[0]
        return group.lag_count, max(0, behind_ms) / 1000
