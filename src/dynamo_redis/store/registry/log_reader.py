"""The one reader of the change log in a process: follows it, detects lost history, and feeds the watches.

It keeps a position. History was lost if an entry's predecessor is not that position, if the registry no
longer has the position (compared after each empty read and each reconnect), or if the incarnation is another.
Then every view is read again, and every watch gets the difference. A broken connection alone loses no
history: reading continues at the position.

With n processes, each change goes to n readers. So where there are many processes, one that watches nothing
*rests*: it polls the registry's position, reads no entries, and from time to time has its own keys compared
with the registry. A watch ends that. Until the number of processes is known a reader rests, too.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import Compacted, InvalidRecord, SchemaMismatch, StoreError, StoreUnavailable
from dynamo_redis.store.base import Revision, Snapshot
from dynamo_redis.store.redis.blocking import pack, pack_word
from dynamo_redis.store.redis.health import Health
from dynamo_redis.store.registry.change_log import Change, Position, order, size_bytes
from dynamo_redis.store.registry.scripts_api import HistoryLost, KeyValue, check_chain, parse_changes
from dynamo_redis.store.registry.watch import Fanout, QueueWatch
from dynamo_redis.supervision import Supervisor

logger = logging.getLogger(__name__)

BLOCK_S: Final = 2.0
CATCH_UP_POLL_S: Final = 0.002
RESYNC_WINDOW_S: Final = 5.0
"""Longest delay of a resync, so that not all processes read at once."""
RESYNC_S: Final = 0.0002
RESYNC_RECORD_S: Final = 2e-6
"""Time that a server needs for one process's resync, and for each record of it."""
CONNECTIONS_A_PROCESS: Final = 4
ALL_FOLLOW_COUNT: Final = 64
"""Number of processes up to which all of them follow the log; above twice as many, those without a watch
rest."""
COMPARE_S: Final = 10.0
"""Shortest time between two comparisons of the own keys while the reader rests and the registry changes."""
COMPARE_ANYWAY_S: Final = 30.0
"""The same while the registry does not change: records can be damaged without a trace in the log."""


def spread_s(process_count: int) -> float:
    """Return a random wait, at most 1 s, that spreads the same action of that many processes."""
    return random.uniform(0, min(1.0, 0.05 * max(1.0, process_count / 8)))  # noqa: S311 - jitter


class LogReader:
    """Follows the log from `start` to `aclose`, in a task of its own.

    `on_changes` is called with the changes read, in order; `on_disturbance` with a reason, after a
    reconnect or lost history. Both are called on the event loop and must not raise.
    """

    def __init__(
        self,
        kv: KeyValue,
        health: Health,
        *,
        on_changes: Callable[[Sequence[Change]], None],
        on_disturbance: Callable[[str], None],
    ) -> None:
        self.fanout = Fanout()
        self.process_count = 1
        self._kv = kv
        self._health = health
        self._on_changes = on_changes
        self._on_disturbance = on_disturbance
        self._position: Position | None = None
        self._cursor = Revision("")  # the last entry read, also one that is not a change of the registry
        self._lost: str | None = None
        self._supervisor = Supervisor(logger, "registry log reader")
        self._loading = asyncio.Lock()
        self._connection = kv.client.blocking(kv.keys.log)
        self._task: asyncio.Task[None] | None = None
        self._loads: set[asyncio.Task[None]] = set()
        self._many_processes = True
        self._rests = False
        self._wanted = asyncio.Event()
        """Set when a watch begins, or few processes are left."""
        self._compared_at = time.monotonic()
        self._compared: Position | None = None

    @property
    def rests(self) -> bool:
        """True while the log is not read, since this process watches nothing and there are many."""
        return self._rests

    @property
    def position(self) -> Position:
        """Position of the last change read."""
        assert self._position is not None, "the registry has not been started"
        return self._position

    def note_process_count(self, count: int) -> None:
        """Take over the number of processes. It spreads the load of a resync, and lets the reader rest."""
        self.process_count = count
        if count > 2 * ALL_FOLLOW_COUNT:
            self._many_processes = True
        elif count <= ALL_FOLLOW_COUNT and self._many_processes:
            self._many_processes = False
            self._wanted.set()

    def start(self, position: Position) -> None:
        """Follow the log from `position` on."""

        async def read_on() -> None:
            backoff = Backoff()
            while True:
                try:
                    await self._verify()
                    if self._may_rest():
                        backoff.reset()
                        await self._rest()
                        continue
                    async with self._loading:
                        await self._end_rest()
                    # Read once without blocking, which also shows whether the log can be read at all.
                    self._cursor = self.position.revision
                    count = self._kv.log_page.count  # a smaller one would part the changes of a transaction
                    read = pack("XREAD", "COUNT", count, "STREAMS", self._kv.keys.log, self._cursor)
                    reply = await self._connection.execute(read, block_s=0.0)
                    if not self._health.connected:
                        self._health.succeeded()
                        self._on_disturbance("the connection was lost")
                    if reply is not None:
                        self._advance(reply[0][1])
                    backoff.reset()
                    await self._follow()
                except HistoryLost as exc:
                    self._lost = str(exc)
                    await self._kv.client.pause(
                        backoff.next_s()
                    )  # an entry of another program may be found again
                except StoreError as exc:
                    self._kv.log_page.failed()
                    self._health.failed(await self._kv.client.named(exc, self._kv.keys.structures))
                    await self._kv.client.pause(backoff.next_s())
                except Exception as exc:  # noqa: BLE001 - logged, with its traceback
                    self._supervisor.failed(exc)
                    self._lost = "the change log could not be read"
                    await self._kv.client.pause(backoff.next_s())

        self._position = position
        self._task = asyncio.create_task(read_on(), name="registry log reader")

    async def aclose(self) -> None:
        """Stop reading and end every watch."""
        tasks = [task for task in (self._task, *self._loads) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.fanout.aclose()
        await self._connection.aclose()

    # ------------------------------------------------------------------ following

    async def _follow(self) -> None:
        """Read entries until a read fails, or the reader may rest."""
        page, block_ms, count, read_after = self._kv.log_page, round(BLOCK_S * 1000), 0, b""
        while not self._may_rest():
            if count != page.count:
                count = page.count
                limits = ("COUNT", count, "BLOCK", block_ms)
                read_after = pack("XREAD", *limits, "STREAMS", self._kv.keys.log, more_count=1)
            reply = await self._connection.execute(read_after + pack_word(self._cursor), block_s=BLOCK_S)
            if reply is None:
                await self._verify()
            else:
                changes = self._advance(reply[0][1])
                page.took(len(changes), size_bytes(changes))
                await asyncio.sleep(0)  # the readers of these changes run before the next read

    async def _rest(self) -> None:
        """Poll the registry's position until the log is wanted. Raises StoreError."""
        self._rests, self._compared = True, self._position
        self._wanted.clear()
        await self._connection.aclose()
        while self._may_rest():
            if not self._health.connected:
                self._health.succeeded()
                self._on_disturbance("the connection was lost")
            self._compare_at_times()
            with suppress(TimeoutError):
                async with asyncio.timeout(BLOCK_S * random.uniform(0.75, 1.25)):  # noqa: S311 - jitter
                    await self._wanted.wait()
            await self._verify()

    def _may_rest(self) -> bool:
        """Return whether the log need not be read."""
        return self._many_processes and not self.fanout.views

    async def _end_rest(self) -> None:
        """Go on at the registry's present position. To be called in `_loading`, before any view is loaded.
        Raises StoreError."""
        if self._rests:
            self._position = await self._kv.initialize()
            self._cursor = self._position.revision
            self._rests = False
            self._on_disturbance("the log was not followed")

    def _compare_at_times(self) -> None:
        """Have the own keys compared with the registry, if the last comparison is old enough."""
        age_s = time.monotonic() - self._compared_at
        if age_s >= COMPARE_ANYWAY_S or (age_s >= COMPARE_S and self._compared != self._position):
            self._compared_at, self._compared = time.monotonic(), self._position
            self._on_disturbance("the log is not followed")

    def _advance(self, entries: Sequence[Any]) -> Sequence[Change]:
        """Move the position past entries; return the changes in them."""
        changes = parse_changes(entries, self._leave_out)
        check_chain(self.position.revision, self.position.operation, changes)
        self._cursor = Revision(entries[-1][0].decode())
        if not changes:
            return changes
        last = changes[-1]
        self._position = self._kv.saw(Position(self.position.incarnation, last.revision, last.operation))
        self.fanout.follow(changes)
        self._on_changes(changes)
        return changes

    def _leave_out(self, exc: InvalidRecord) -> None:
        self._supervisor.skip(exc.key, exc)

    async def _verify(self) -> None:
        """Check that the registry still has the reader's position; resync if not, and after lost history."""
        now = await self._kv.position()
        if now is None or self._compare(now):
            # The log decides: a change that a script has logged and not yet applied is not in the head.
            now = await self._kv.initialize()
        reason = self._compare(now) or self._lost
        if reason is not None:
            self._lost = reason
            await self._resync(reason)
            self._lost = None
        elif self._rests:
            self._position = now

    def _compare(self, now: Position) -> str | None:
        known = self.position
        if now.incarnation != known.incarnation:
            return "the registry was wiped"
        if order(now.revision) < order(known.revision):
            return "the registry's history was rewound"
        if now.revision == known.revision and now.operation != known.operation:
            return "the registry's history was rewritten"
        return None

    async def _resync(self, reason: str) -> None:
        # Wait a random time, long enough for all processes to read their views one after the other. Their
        # number is that of the leases, or follows from the connections if INFO is allowed: frontends have no
        # lease.
        process_count = max(self.process_count, await self._kv.client_count() // CONNECTIONS_A_PROCESS)
        record_count = sum(len(view.records) for view in self.fanout.views.values())
        window_s = min(RESYNC_WINDOW_S, process_count * (RESYNC_S + record_count * RESYNC_RECORD_S))
        await asyncio.sleep(random.uniform(0, window_s))  # noqa: S311 - jitter
        async with self._loading:
            position = await self._kv.initialize()
            views = list(self.fanout.views.values())  # views may be added and removed meanwhile
            loaded = [(view, *await self._kv.snapshot(view.prefix)) for view in views]
            if any(at.incarnation != position.incarnation for _, _, at in loaded):
                raise HistoryLost("the registry was wiped")
            for view, snapshot, at in loaded:
                self._leave_out_invalid(snapshot)
                view.replace(snapshot, at, reason)
            self._position, self._cursor = position, position.revision
        logger.info("resync of %d watched prefixes: %s", len(loaded), reason)
        self._on_disturbance(reason)

    def _leave_out_invalid(self, snapshot: Snapshot) -> None:
        for exc in snapshot.invalid:
            self._leave_out(exc)

    # ------------------------------------------------------------------ watches

    def watch(self, prefix: str, start_revision: Revision | None) -> QueueWatch:
        """Return a new watch; a task loads its first batch."""
        watch = self.fanout.watch(prefix, after=start_revision is not None)
        self._wanted.set()
        if not watch.view.is_loaded or start_revision is not None:
            task = asyncio.create_task(self._load(watch, start_revision), name=f"watch of {prefix!r}")
            self._loads.add(task)
            task.add_done_callback(self._loads.discard)
        return watch

    async def _load(self, watch: QueueWatch, start_revision: Revision | None) -> None:
        backoff = Backoff()
        while not watch.closed:
            try:
                await self._load_view(watch)
                if start_revision is not None:
                    await self._load_history(watch, start_revision)
                return
            except (Compacted, SchemaMismatch) as exc:
                watch.fail(exc)
                return
            except StoreError as exc:
                logger.debug("watch of %r: %s", watch.view.prefix, exc)
            except Exception as exc:  # noqa: BLE001 - logged, with its traceback
                self._supervisor.failed(exc)
            await self._kv.client.pause(backoff.next_s())

    async def _load_view(self, watch: QueueWatch) -> None:
        view = watch.view
        while not view.is_loaded:
            async with self._loading:
                if not view.is_loaded:
                    await self._end_rest()
                    view.begin_load()
                    snapshot, position = await self._kv.snapshot(view.prefix)
                    if position.incarnation != self.position.incarnation:
                        raise HistoryLost("the registry was wiped")
                    self._leave_out_invalid(snapshot)
                    view.finish_load(snapshot, position)

    async def _load_history(self, watch: QueueWatch, start_revision: Revision) -> None:
        """Load the changes from `start_revision` to the view's position. Raises Compacted."""
        now = await self._kv.position()
        try:
            if now is None or order(now.revision) < order(start_revision):
                raise Compacted(start_revision)
            # Wait until the view has reached the revision.
            loop = asyncio.get_running_loop()
            deadline = loop.time() + self._kv.client.timeout_s
            while (at := watch.view.position) is None or order(at.revision) < order(start_revision):
                if loop.time() > deadline:
                    raise StoreUnavailable("the change log is not being read")
                await asyncio.sleep(CATCH_UP_POLL_S)
            joined = watch.join()
            watch.begin_with(await self._kv.changes(start_revision, None, joined), joined.revision)
        except (HistoryLost, ValueError) as exc:
            raise Compacted(start_revision) from exc
