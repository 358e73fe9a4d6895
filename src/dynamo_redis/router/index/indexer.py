"""Keeps an index equal to what the workers' caches hold, whatever happens on the way.

The parts, each with its own page: `following` reads events, `ledger` applies each exactly once and finds what
is missing, `recovery` asks workers, `members` says which workers there are, `snapshotter` stores the index.
This one puts them together.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from dynamo_redis.backoff import Backoff
from dynamo_redis.config import RouterSettings
from dynamo_redis.errors import InvalidRecord, StoreError, StoreUnavailable
from dynamo_redis.names import format_instance_id
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.router.base import Matched, Worker
from dynamo_redis.router.index.followers import StreamFollower, TopicFollower
from dynamo_redis.router.index.ledger import Ledger, Outcome
from dynamo_redis.router.index.members import Members
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.router.index.recovery import OnBlockSize, Recovery
from dynamo_redis.router.index.snapshot import Snapshot, decode_snapshot
from dynamo_redis.router.index.snapshotter import Snapshots, Snapshotter, StoredSnapshot
from dynamo_redis.router.index.state import IndexerState
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.store.event_base import EntryId, StreamName, entry_order
from dynamo_redis.supervision import Supervisor
from dynamo_redis.wire.event import EventBatch
from dynamo_redis.wire.topics import KV_DUMP, KV_EVENTS

log = logging.getLogger(__name__)

START_S: Final = 10.0
"""How long `start` waits for the past to be read."""

VERIFY_S: Final = 1.0
"""How long after the start all workers are asked, jittered."""

_SETTLE_S: Final = 2.0  # and then for workers to answer

_SWEEP_COUNT: Final = 4096
_KEEP_S: Final = 1.0
_LAG_S: Final = 2.0


_Lag = tuple[int | None, float | None]
"""Entries, and seconds; None if unknown."""


class Indexer:
    """The index of one component's workers, and the tasks that keep it: one that follows the events, one the
    members, one that tidies up and measures, one that stores snapshots, and one for each worker that is
    asked. All end with `aclose`. For one event loop.

    Losing Redis leaves the index as it is. `find` is synchronous, and never waits for anything.
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
        `on_block_size` is told how large the blocks of each worker are that says what it holds."""
        self.router_id = router_id
        self._settings = settings
        self._mode = runtime.settings.events.event_plane
        self._on_block_size = on_block_size
        self._runtime = runtime
        self._streams = runtime.events
        self._stream = StreamName(namespace, component, KV_EVENTS)
        self._workers = f"{namespace}.{component}.{KV_DUMP}"
        self._ledger = Ledger(
            KvIndex(
                max_blocks=settings.router_max_tree_size,
                prune_target_ratio=settings.router_prune_target_ratio,
            )
        )
        self._snapshots = Snapshots(
            runtime.objects, runtime.locks, self._streams, self._stream, decode=self._decode
        )
        self._snapshotter = Snapshotter(
            self._snapshots, self._take_snapshot, self._settle, settings.router_snapshot_threshold
        )
        self._follower: StreamFollower | TopicFollower
        if self._mode == "pubsub":
            self._follower = TopicFollower(self._streams, self._stream, self)
        else:
            self._follower = StreamFollower(self._streams, self._stream, router_id, self, self._load_snapshot)
        self._client: Client | None = None
        self._recovery: Recovery
        self._members: Members
        self._tasks: list[asyncio.Task[None]] = []
        self._has_caught_up = asyncio.Event()
        self._lag: _Lag = (None, None)
        self._supervisor = Supervisor(log, f"index of {self._stream.path}")
        self._gaps_count = 0
        self._unreadable_count = 0
        self._complaints = RateLimitedLog(log)

    def __repr__(self) -> str:
        return f"<Indexer {self._stream.path}: {self.index.block_count} blocks>"

    # ----------------------------------------------------------------- lifetime

    async def start(self) -> None:
        """Return when the past has been read and who was not known has answered; after `START_S` and some
        seconds at the latest, since what is missing then is made up for. Raises StoreError if the workers
        cannot be listed for as long."""
        self._client = await self._list_workers()
        self._recovery = Recovery(self._ledger, self._client, self._mode, self._on_block_size)
        self._members = Members(self._ledger, self._recovery, self._client)
        self._members.start()
        self._spawn(self._follow(), "follow KV events")
        self._spawn(self._supervisor.run(self._keep), "keep KV index")
        if self._mode == "stream":
            self._snapshotter.start()
        try:
            async with asyncio.timeout(START_S):
                await self._has_caught_up.wait()
            await self._recovery.settle(_SETTLE_S)
        except TimeoutError:
            log.warning("%r serves with what it has: the events of before cannot be read yet", self)

    async def _list_workers(self) -> Client:
        until = time.monotonic() + START_S
        backoff = Backoff()
        while True:
            try:
                return await self._runtime.endpoint(self._workers).client()
            except StoreUnavailable:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(backoff.next_s())

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
            await self._follower.aclose()
            await client.aclose()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"{name} of {self._stream.path}")
        task.add_done_callback(_report)
        self._tasks.append(task)

    # ----------------------------------------------------------------- what is known

    @property
    def index(self) -> KvIndex:
        """The index as it is now. Another object may take its place until `start` returns."""
        return self._ledger.index

    def find(self, hashes: Sequence[int]) -> dict[Worker, Matched]:
        """As `KvIndex.find`."""
        return self._ledger.index.find(hashes)

    def state(self) -> IndexerState:
        """What it knows, and how it came to."""
        is_running = self._client is not None
        follower, recovery = self._follower, self._recovery if is_running else None
        lag_count, lag_s = self._lag if follower.connected else (None, None)
        return IndexerState(
            mode=self._mode,
            connected=follower.connected,
            disconnected_s=round(follower.disconnected_s, 3),
            caught_up=follower.connected and self._has_caught_up.is_set(),
            block_count=self.index.block_count,
            worker_count=len(self.index.workers()),
            position=follower.position if isinstance(follower, StreamFollower) else None,
            lag_count=lag_count,
            lag_s=lag_s,
            snapshot=self._snapshotter.last,
            snapshots_stored_count=self._snapshotter.stored_count,
            events_count=self._ledger.applied_count,
            repeated_count=self._ledger.repeated_count,
            unreadable_count=self._unreadable_count,
            gaps_count=self._gaps_count,
            cut_off_count=follower.cut_off_count,
            recovered_count=recovery.recovered_count if recovery else 0,
            unanswered_count=recovery.failed_count if recovery else 0,
            asking=tuple(format_instance_id(i) for i in recovery.asking()) if recovery else (),
        )

    async def save_snapshot(self) -> StoredSnapshot:
        """Store a snapshot now and trim the stream, unless one that is young enough is stored. Raises
        StoreError; LockNotAcquired if another router is storing one."""
        return await self._snapshotter.save()

    # ----------------------------------------------------------------- what is read (`Intake`)

    def take(self, content: bytes) -> int:
        """Apply one batch; ask whoever may know better if that is impossible. As `Intake.take`."""
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
        if self._ledger.take(batch) is Outcome.MISSING:
            self._gaps_count += 1
            self._members.miss(batch.publisher.instance_id)
        return len(batch.events)

    def applied(self, position: EntryId, event_count: int) -> None:
        """As `Intake.applied`."""
        self._snapshotter.note(position, event_count)

    def restore(self, snapshot: Snapshot) -> None:
        """As `Intake.restore`."""
        self._ledger.restore(snapshot.index, snapshot.publishers)

    def doubt(self) -> None:
        """As `Intake.doubt`."""
        self._recovery.ask_all()

    def caught_up(self) -> None:
        """As `Intake.caught_up`."""
        if not self._has_caught_up.is_set():
            self._members.begin()
            # What a snapshot says of a worker is of a process that may have been followed by another since.
            # That is rare, and routers may start together: they ask later, while requests are served.
            self._recovery.ask_all(after_s=VERIFY_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
            self._has_caught_up.set()

    # ----------------------------------------------------------------- snapshots

    def _decode(self, content: bytes) -> Snapshot:
        return decode_snapshot(
            content,
            max_blocks=self._settings.router_max_tree_size,
            prune_target_ratio=self._settings.router_prune_target_ratio,
        )

    async def _load_snapshot(self) -> Snapshot | None:
        stored = await self._snapshots.load()
        if stored is None:
            return None
        snapshot, described = stored
        self._snapshotter.found(described)
        return snapshot

    def _take_snapshot(self) -> Snapshot:
        assert isinstance(self._follower, StreamFollower)
        return Snapshot(self._follower.position, self._ledger.exact(), self._ledger.index)

    async def _settle(self, timeout_s: float) -> bool:
        return await self._recovery.settle(timeout_s)

    # ----------------------------------------------------------------- tasks

    async def _follow(self) -> None:
        if self._settings.router_reset_states and self._mode == "stream":
            await self._reset()
        await self._follower.run()

    async def _reset(self) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._snapshots.reset()
            except StoreError as exc:
                log.warning("snapshot and stream of %s are not reset yet: %s", self._stream.path, exc)
                await asyncio.sleep(backoff.next_s())
            else:
                log.info("snapshot and stream of %s are reset", self._stream.path)
                return

    async def _keep(self) -> None:
        """Give back the memory of workers that are gone, and look how far the stream is ahead."""
        looked_at = 0.0
        while True:
            is_owed = self.index.sweep(_SWEEP_COUNT)
            await asyncio.sleep(0 if is_owed else _KEEP_S)
            if self._mode == "stream" and time.monotonic() - looked_at > _LAG_S:
                looked_at = time.monotonic()
                self._lag = await self._measure_lag()

    async def _measure_lag(self) -> _Lag:
        assert isinstance(self._follower, StreamFollower)
        try:
            info = await self._streams.info(self._stream)
        except StoreError:
            return None, None
        group = next((group for group in info.groups if group.name == self.router_id), None) if info else None
        if info is None or group is None:
            return None, None
        behind_ms = entry_order(info.last_entry_id)[0] - entry_order(self._follower.position)[0]
        return group.lag_count, max(0, behind_ms) / 1000


def _report(task: asyncio.Task[None]) -> None:
    """None of these tasks ends but by cancellation: a defect must not be silent."""
    if not task.cancelled() and (exc := task.exception()) is not None:
        log.error("%s has failed", task.get_name(), exc_info=exc)
