"""From an engine's own KV events to its worker's publishers: in order, without holes, or begun anew.

An engine numbers its messages from 0 at each start of its process. What arrives is held against what was
applied last; what is missing is asked of the engine's replay socket, if it has one. What cannot be had that
way makes everything told before worthless: the rank's cache is reported as empty, and fills again with what
the engine stores from then on.

| seen | then |
|---|---|
| connected | replay from what was applied last: is it the same engine, and what was missed? |
| a higher sequence | a gap: replay; without replay, or if it no longer has all of it, begin anew |
| a lower sequence | what the replay brought already, by its content; else a restart: begin anew |
| nothing for a while | replay, in case the last messages of a burst were dropped |
| not a batch of events | it might have removed anything: begin anew |

The engine may be away as long as it likes: what is known of its cache stays until the next sign of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from typing import Final

from dynamo_redis.engines.openai.zmq_sockets import Subscription, replay
from dynamo_redis.engines.openai.zmq_wire import (
    Cleared,
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
"""After so long without a message the replay socket is asked whether there was one."""

REPLAY_S: Final = 10.0
"""Longest time for a replay; meanwhile new messages wait."""

_TURN_COUNT: Final = 64
"""Messages applied before others get their turn on the event loop."""


class EventRelay:
    """The ranks of one engine, a task for each."""

    def __init__(
        self,
        publishers: Sequence[KvPublisher],
        *,
        events_endpoint: str,
        replay_endpoint: str | None = None,
        topic: str = "",
        idle_s: float = IDLE_S,
    ) -> None:
        """`events_endpoint` is rank 0's; each further rank's port is one higher. Raises ValueError for an
        endpoint that is no address."""
        self.ranks = [
            RankRelay(
                publisher,
                Subscription(rank_endpoint(events_endpoint, rank), topic),
                replay_endpoint and rank_endpoint(replay_endpoint, rank),
                idle_s=idle_s,
            )
            for rank, publisher in enumerate(publishers)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to follow; the engine need not be there yet."""
        for rank, relay in enumerate(self.ranks):
            task = asyncio.create_task(relay.run(), name=f"KV events of rank {rank}")
            task.add_done_callback(_report_failure)
            self._tasks.append(task)

    @property
    def partial(self) -> bool:
        """Whether some rank may hold blocks that it will not tell again."""
        return any(relay.partial for relay in self.ranks)

    def forget(self, why: str) -> None:
        """What the engine said so far counts no more: its process is known to have ended."""
        for relay in self.ranks:
            relay.begin_anew("restart", why)

    async def aclose(self) -> None:
        """Stop. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for relay in self.ranks:
            relay.close()


def rank_endpoint(endpoint: str, rank: int) -> str:
    """Where a rank publishes: its port is that of rank 0 plus its number. Raises ValueError."""
    if rank == 0:
        return endpoint
    address, colon, port = endpoint.rpartition(":")
    if not endpoint.startswith("tcp://") or not colon or not port.isdecimal():
        raise ValueError(f"{endpoint} has no port to add the rank to")
    return f"{address}:{int(port) + rank}"


def _report_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (failure := task.exception()) is not None:
        log.error("%s are no longer relayed", task.get_name(), exc_info=failure)


class RankRelay:
    """One rank. `counts` says what happened: `message`, `repeated`, `gap`, `replayed`, `replay_failed`.

    Why it was begun anew: `restart`, `lost`, `malformed`, and `reset` if blocks were forgotten for it. What
    was left out: `zmq_wire`'s reasons, and `other_group`.
    """

    def __init__(
        self,
        publisher: KvPublisher,
        subscription: Subscription,
        replay_endpoint: str | None,
        *,
        idle_s: float = IDLE_S,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.partial = False
        """Whether the engine may hold blocks that it will not tell again: only prompts say what."""
        self._publisher = publisher
        self._subscription = subscription
        self._replay_endpoint = replay_endpoint
        self._idle_s = idle_s
        self._group = MainGroup()
        self._next: int | None = None  # the sequence to come; None before the first, and when begun anew
        self._last_digest = 0  # of the payload before
        self._replayed: dict[int, int] = {}  # digests of what came by replay, and may come again
        self._connected = False
        self._missed = False  # whether it was said that nobody is there
        self._connection_count = 0
        self._verified = False  # whether the engine of this connection is known to be the one of before
        self._supervisor = Supervisor(log, f"KV events of rank {publisher.dp_rank}")

    def close(self) -> None:
        """Give the sockets back. Idempotent."""
        self._subscription.close()

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            await self._supervisor.run(self._follow)
        finally:
            self.close()

    async def _follow(self) -> None:
        while True:
            quiet = not await self._subscription.wait(self._idle_s)
            await self._look_at_connection(quiet=quiet)
            for _ in range(_TURN_COUNT):
                frames = await self._subscription.take()
                if frames is None:
                    break
                try:
                    await self._take(frames)
                except Exception as exc:  # noqa: BLE001 - logged, with its traceback
                    self._supervisor.skip("a message of the engine", exc)
                    self.begin_anew("malformed", "a message cannot be taken")
            await asyncio.sleep(0)

    # ----------------------------------------------------------------- what arrives

    async def _look_at_connection(self, *, quiet: bool) -> None:
        await self._subscription.look()
        connected = self._subscription.connected
        if connected != self._connected:
            self._connected = connected
            self._missed = False
            state = "follows the engine's KV events at" if connected else "has lost the engine's KV events at"
            log.info("rank %d %s %s", self._publisher.dp_rank, state, self._subscription.endpoint)
        if self._subscription.connection_count != self._connection_count:
            self._connection_count = self._subscription.connection_count
            self._verified = False
            await self._catch_up()
        elif quiet and connected:
            await self._catch_up()
        elif quiet and not self._missed:
            self._missed = True
            log.warning(
                "rank %d: nobody publishes KV events at %s: routers do not know this engine's cache",
                self._publisher.dp_rank,
                self._subscription.endpoint,
            )

    async def _take(self, frames: list[bytes]) -> None:
        try:
            sequence, payload = split_message(frames)
        except ValueError as exc:
            self.begin_anew("malformed", str(exc))
            return
        self.counts["message"] += 1
        if self._next is not None and sequence < self._next:
            if self._replayed.pop(sequence, None) == hash(payload):
                self.counts["repeated"] += 1
                return
            self.begin_anew("restart", "the engine has restarted")
        if sequence != (self._next or 0):
            await self._fill_gap(sequence)
            if self._replayed.pop(sequence, None) == hash(payload):
                return
        else:
            self._replayed.clear()  # they come in order: what has not come again by now never will
        self._apply(sequence, payload)

    async def _fill_gap(self, sequence: int) -> None:
        """Bring what precedes that message, or begin anew with it."""
        first = self._next
        self.counts["gap"] += first is not None
        await self._catch_up()
        if first is not None and self._next is not None and self._next < sequence:
            self.begin_anew("lost", f"messages {self._next} to {sequence - 1} are lost")

    def _apply(self, sequence: int, payload: bytes) -> None:
        self.partial |= self._next is None and sequence > 0
        self._next = sequence + 1
        self._last_digest = hash(payload)
        try:
            batch = decode_batch(payload)
        except ValueError as exc:
            self.begin_anew("malformed", str(exc))
            self._next = sequence + 1
            return
        self.counts.update(batch.left_out)
        for event in join_removals(batch.events):
            if not self._group.holds(event):
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

    def begin_anew(self, reason: str, what: str) -> None:
        """Nothing that the engine said so far counts."""
        self.counts[reason] += 1
        self.partial = reason != "restart"
        self._next = None
        self._replayed.clear()
        self._group.forget()
        if self._publisher.block_count:
            self.counts["reset"] += 1
            log.warning("rank %d: %s: its known KV blocks are forgotten", self._publisher.dp_rank, what)
            self._publisher.reset()

    # ----------------------------------------------------------------- what is missing

    async def _catch_up(self) -> None:
        """Apply what the replay socket has and this side has not; and see whether the engine is the same."""
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
        """One replay, from the message applied last. False if it ended early: it has holes where the engine's
        socket dropped messages at its own high-water mark, or shows another engine."""
        known = None if self._next is None else (self._next - 1, self._last_digest)
        seen = False
        async with aclosing(replay(endpoint, known[0] if known else 0, deadline)) as messages:
            async for sequence, payload in messages:
                if known and not seen and (sequence, hash(payload)) != known:
                    if sequence == known[0]:
                        self.begin_anew("restart", "the engine has restarted")
                        return False
                    self.begin_anew("lost", f"messages {known[0] + 1} to {sequence - 1} are lost")
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
            self.begin_anew("restart", "the engine has restarted")
            return False
        self._verified = True
        return True
