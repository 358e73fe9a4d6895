"""The relay of an engine's own KV events to its worker's publishers: in order, and without gaps.

An engine numbers its messages from 0 at each start of its process. The relay compares each message's sequence
with that of the last message applied. It requests missing messages from the engine's replay socket, if the
engine has one. If messages stay missing, the state known so far is useless, and the relay starts over: it
reports the rank's cache as empty, and then the blocks that the engine stores from that time on.

| event | action |
|---|---|
| connected | replay from the last message applied: is it the same engine, and was a message missed? |
| a higher sequence | a gap: replay; start over without a replay socket, or if the replay has not all of it |
| a lower sequence | skip it if the replay had the same message; else the engine has restarted: start over |
| no message for `IDLE_S` | replay, in case the last messages of a burst were dropped |
| not a batch of events | start over: the message may have been a removal |

An engine may be away for any time: the known state of its cache stays until it sends again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from typing import Final

from dynamo_redis.events.engine_zmq.sockets import EventSubscriber, replay
from dynamo_redis.events.engine_zmq.wire import (
    Cleared,
    EventSource,
    MainGroup,
    Removed,
    Stored,
    decode_batch,
    join_removals,
    split_message,
)
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

IDLE_S: Final = 30.0
"""Seconds without a message after which the replay socket is asked for missed ones."""

REPLAY_S: Final = 10.0
"""Time-out of a replay; new messages wait meanwhile."""

_TURN_COUNT: Final = 64
"""Messages applied before other tasks of the event loop run."""


class EventRelay:
    """The relays of one engine's ranks, with a task for each."""

    def __init__(
        self,
        publishers: Sequence[KvPublisher],
        sources: Sequence[EventSource],
        *,
        idle_s: float = IDLE_S,
    ) -> None:
        """Make a relay for each publisher that has a source. Raises ValueError for an invalid endpoint.

        Args:
            publishers: one for each rank, in order.
            sources: likewise the sockets of each rank.
            idle_s: seconds without a message after which a replay is requested.
        """
        self.ranks = [
            RankRelay(
                publisher,
                EventSubscriber(source.endpoint, source.topic),
                source.replay_endpoint,
                idle_s=idle_s,
            )
            for publisher, source in zip(publishers, sources, strict=False)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start to relay; the engine need not be there yet."""

        def report_failure(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (failure := task.exception()) is not None:
                log.error("%s are no longer relayed", task.get_name(), exc_info=failure)

        for rank, relay in enumerate(self.ranks):
            task = asyncio.create_task(relay.run(), name=f"KV events of rank {rank}")
            task.add_done_callback(report_failure)
            self._tasks.append(task)

    @property
    def partial(self) -> bool:
        """True if a rank may hold blocks whose events were lost."""
        return any(relay.partial for relay in self.ranks)

    def forget(self, why: str) -> None:
        """Forget the blocks of all ranks: the engine's process is known to have ended."""
        for relay in self.ranks:
            relay.start_over("restart", why)

    async def aclose(self) -> None:
        """Stop the relays. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for relay in self.ranks:
            relay.close()


def rank_endpoint(endpoint: str, rank: int) -> str:
    """Return the endpoint of a rank: its port is that of rank 0 plus its number. Raises ValueError."""
    if rank == 0:
        return endpoint
    address, colon, port = endpoint.rpartition(":")
    if not endpoint.startswith("tcp://") or not colon or not port.isdecimal():
        raise ValueError(f"{endpoint} has no port to add the rank to")
    return f"{address}:{int(port) + rank}"


def rank_sources(
    rank_count: int, endpoint: str, replay_endpoint: str | None = None, topic: str = ""
) -> list[EventSource]:
    """Return the sources of all ranks by the endpoints of rank 0. Raises ValueError."""
    return [
        EventSource(
            rank_endpoint(endpoint, rank), replay_endpoint and rank_endpoint(replay_endpoint, rank), topic
        )
        for rank in range(rank_count)
    ]


class RankRelay:
    """The relay of one rank.

    `counts` has the numbers of events: `message`, `repeated`, `gap`, `replayed`, `replay_failed`; of starts
    over by reason: `restart`, `lost`, `malformed`, and `reset` if blocks were forgotten; of events left out
    by reason: those of `wire`, and `other_group`.
    """

    def __init__(
        self,
        publisher: KvPublisher,
        subscriber: EventSubscriber,
        replay_endpoint: str | None,
        *,
        idle_s: float = IDLE_S,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.partial = False
        """True if the engine may hold blocks whose events were lost: only prompts show them."""
        self._publisher = publisher
        self._subscriber = subscriber
        self._replay_endpoint = replay_endpoint
        self._idle_s = idle_s
        self._group = MainGroup()
        self._next: int | None = (
            None  # the next sequence; None before the first message and after a start over
        )
        self._last_digest = 0  # of the last payload applied
        self._replayed: dict[int, int] = {}  # digests of replayed payloads by sequence: they may arrive again
        self._connected = False
        self._absence_logged = False
        self._connection_count = 0
        self._verified = False  # the engine of this connection is known to be the same process as before
        self._supervisor = Supervisor(log, f"KV events of rank {publisher.dp_rank}")

    def close(self) -> None:
        """Close the sockets. Idempotent."""
        self._subscriber.close()

    async def run(self) -> None:
        """Receive and handle messages; check the connection at each, and after `idle_s` without one. Runs
        until cancelled."""

        async def follow() -> None:
            while True:
                quiet = not await self._subscriber.wait(self._idle_s)
                await self._check_connection(quiet=quiet)
                for _ in range(_TURN_COUNT):
                    frames = await self._subscriber.receive_now()
                    if frames is None:
                        break
                    try:
                        await self._handle(frames)
                    except Exception as exc:  # noqa: BLE001 - logged, with its traceback
                        self._supervisor.skip("a message of the engine", exc)
                        self.start_over("malformed", "a message could not be handled")
                await asyncio.sleep(0)

        try:
            await self._supervisor.run(follow)
        finally:
            self.close()

    # ----------------------------------------------------------------- messages

    async def _check_connection(self, *, quiet: bool) -> None:
        """Log a change of the connection; request missed messages after a new connection or a quiet time."""
        await self._subscriber.update_connection()
        connected = self._subscriber.connected
        if connected != self._connected:
            self._connected = connected
            self._absence_logged = False
            state = (
                "receives the engine's KV events at" if connected else "has lost the engine's KV events at"
            )
            log.info("rank %d %s %s", self._publisher.dp_rank, state, self._subscriber.endpoint)
        if self._subscriber.connection_count != self._connection_count:
            self._connection_count = self._subscriber.connection_count
            self._verified = False
            await self._catch_up()
        elif quiet and connected:
            await self._catch_up()
        elif quiet and not self._absence_logged:
            self._absence_logged = True
            log.warning(
                "rank %d: no engine publishes KV events at %s: routers do not know this engine's cache",
                self._publisher.dp_rank,
                self._subscriber.endpoint,
            )

    async def _handle(self, frames: list[bytes]) -> None:
        """Apply a message, after the messages before it; skip it if the replay had it."""
        try:
            sequence, payload = split_message(frames)
        except ValueError as exc:
            self.start_over("malformed", str(exc))
            return
        self.counts["message"] += 1
        if self._next is not None and sequence < self._next:
            if self._replayed.pop(sequence, None) == hash(payload):
                self.counts["repeated"] += 1
                return
            self.start_over("restart", "the engine has restarted")
        if sequence != (self._next or 0):
            first = self._next
            self.counts["gap"] += first is not None
            await self._catch_up()
            if first is not None and self._next is not None and self._next < sequence:
                self.start_over("lost", f"messages {self._next} to {sequence - 1} are lost")
            if self._replayed.pop(sequence, None) == hash(payload):
                return
        else:
            self._replayed.clear()  # messages are in order: those before this one cannot arrive again
        self._apply(sequence, payload)

    def _apply(self, sequence: int, payload: bytes) -> None:
        """Pass the events of a message to the publisher."""
        self.partial |= self._next is None and sequence > 0
        self._next = sequence + 1
        self._last_digest = hash(payload)
        try:
            batch = decode_batch(payload)
        except ValueError as exc:
            self.start_over("malformed", str(exc))
            self._next = sequence + 1
            return
        self.counts.update(batch.left_out)
        for event in join_removals(batch.events):
            if not self._group.includes(event):
                self.counts["other_group"] += 1
                continue
            match event:
                case Stored():
                    self._publisher.stored(
                        event.block_hashes,
                        event.token_ids,
                        event.parent_hash,
                        tier=event.tier,
                        lora_name=event.lora_name,
                    )
                    if event.nameless_hashes:
                        self._publisher.stored_nameless(event.nameless_hashes)
                case Removed():
                    self._publisher.removed(event.block_hashes, tier=event.tier)
                case Cleared():
                    self.partial = False
                    self._publisher.cleared()

    def start_over(self, reason: str, message: str) -> None:
        """Forget all blocks of this rank. `reason` is counted, `message` logged if there were blocks."""
        self.counts[reason] += 1
        self.partial = reason != "restart"
        self._next = None
        self._replayed.clear()
        self._group.forget()
        if self._publisher.block_count:
            self.counts["reset"] += 1
            log.warning("rank %d: %s: its known KV blocks are forgotten", self._publisher.dp_rank, message)
            self._publisher.reset()

    # ----------------------------------------------------------------- replay

    async def _catch_up(self) -> None:
        """Apply the missed messages of the replay socket; find out whether the engine has restarted."""
        if self._replay_endpoint is None:
            return
        deadline = asyncio.get_running_loop().time() + REPLAY_S
        try:
            while True:
                before = self._next
                if await self._replay_once(self._replay_endpoint, deadline) or self._next == before:
                    return
        except (TimeoutError, ValueError) as exc:
            self.counts["replay_failed"] += 1
            log.warning("rank %d: no replay from %s: %r", self._publisher.dp_rank, self._replay_endpoint, exc)

    async def _replay_once(self, endpoint: str, deadline: float) -> bool:
        """Request one replay, from the last message applied on, and apply it.

        Returns False if it ended early: at a gap, where the engine's socket has dropped messages at its
        high-water mark, or because the engine has restarted.
        """
        known = None if self._next is None else (self._next - 1, self._last_digest)
        seen = False
        async with aclosing(replay(endpoint, known[0] if known else 0, deadline)) as messages:
            async for sequence, payload in messages:
                if known and not seen and (sequence, hash(payload)) != known:
                    if sequence == known[0]:
                        self.start_over("restart", "the engine has restarted")
                        return False
                    self.start_over("lost", f"messages {known[0] + 1} to {sequence - 1} are lost")
                seen = True
                if self._next is not None and sequence > self._next:
                    return False
                if self._next is None or sequence == self._next:
                    self._apply(sequence, payload)
                    self._replayed[sequence] = hash(payload)
                    self.counts["replayed"] += 1
                if sequence % _TURN_COUNT == 0:
                    await asyncio.sleep(0)
        if known and not seen and not self._verified:
            self._verified = True
            self.start_over("restart", "the engine has restarted")
            return False
        self._verified = True
        return True
