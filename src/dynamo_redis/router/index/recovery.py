"""Asks workers for their blocks: one worker if its events are missing, all if events of any may be missing.

An ask is one request to the worker's `kv_dump` endpoint. It has the next sequence of each rank; the worker
answers with the events from there on, or with all its blocks. Where no event is missing the answer is empty.
So an ask makes good every possible loss, and an ask without need costs one round trip.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Any, Final

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import InvalidRecord, PlaneError
from dynamo_redis.router.index.ledger import Ledger
from dynamo_redis.runtime.client import Client

log = logging.getLogger(__name__)

ASKS_AT_ONCE_COUNT: Final = 8
"""Asks under way: few enough that answers do not crowd out requests, enough that a slow worker delays few."""

RETRIES_AT_ONCE_COUNT: Final = 2
"""Asks under way of workers that did not answer before: they must not keep other workers from being asked."""

ANSWER_S: Final = 5.0
"""Longest wait for an answer's first item, and for each further one."""

ASK_ALL_PAUSE_S: Final = 1.0
"""Shortest time between two asks of all workers. A call that comes earlier waits: the answers to the later
ask cover all events before it."""

SLICE_S: Final = 0.002
"""Longest time that events are applied before other tasks get their turn of the event loop."""

_RETRY_S: Final = (0.1, 5.0)

OnBlockSize = Callable[[int, int], None]
"""Called with an instance id and the number of tokens in each of its KV blocks."""


class Recovery:
    """Asks instances, each in one task, at most one task an instance.

    At most `ASKS_AT_ONCE_COUNT` of the tasks ask at a time. Beside them at most `RETRIES_AT_ONCE_COUNT` tasks
    ask whose last ask failed; they do so after growing, jittered pauses. A task ends with an answer, by
    `forget`, or by `aclose`.
    """

    def __init__(
        self,
        ledger: Ledger,
        client: Client,
        event_plane: str,
        on_block_size: OnBlockSize | None = None,
        *,
        shards_count: int = 1,
    ) -> None:
        """`event_plane` is the event plane that this router follows, over `shards_count` streams. A worker
        that sends its events by another one, or over another number of streams, is taken to hold nothing,
        since its later events would not arrive. `on_block_size` is called with the block size of each
        instance that answers."""
        self.recovered_count = 0
        """Asks that were answered."""
        self.failed_count = 0
        """Asks that were not answered."""
        self._ledger = ledger
        self._client = client
        self._event_plane = event_plane
        self._shards_count = shards_count
        self._on_block_size = on_block_size
        self._slots = asyncio.Semaphore(ASKS_AT_ONCE_COUNT)
        self._retry_slots = asyncio.Semaphore(RETRIES_AT_ONCE_COUNT)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._sent: set[int] = set()
        self._again: set[int] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._all_timer: asyncio.TimerHandle | None = None
        self._all_due_at = 0.0
        self._all_asked_at = -ASK_ALL_PAUSE_S
        self._closed = False

    # ----------------------------------------------------------------- which instances to ask

    def ask(self, instance_id: int) -> None:
        """Ask an instance now; if it is being asked, once more afterwards, since that answer may be too
        old."""
        if self._closed:
            return
        if instance_id in self._sent:
            self._again.add(instance_id)
        if instance_id in self._tasks:
            return

        async def ask_until_known() -> None:
            # Until it has answered, and no further ask was wanted meanwhile.
            backoff = Backoff(*_RETRY_S)
            failure_count = 0
            try:
                while True:
                    self._again.discard(instance_id)
                    async with self._retry_slots if failure_count else self._slots:
                        failure = await self._ask_once(instance_id)
                    if failure is None:
                        self.recovered_count += 1
                        if instance_id not in self._again:
                            return
                        continue
                    failure_count += 1
                    self.failed_count += 1
                    # One line in the log for each worker, after its second failure.
                    level = logging.WARNING if failure_count == 2 else logging.DEBUG
                    log.log(level, "worker %x gives no usable answer, asking again: %s", instance_id, failure)
                    await asyncio.sleep(backoff.next_s())
            finally:
                if self._tasks.get(instance_id) is asyncio.current_task():
                    del self._tasks[instance_id]
                    self._note_idle()

        self._tasks[instance_id] = asyncio.create_task(ask_until_known(), name=f"ask {instance_id:x}")
        self._idle.clear()

    def ask_all(self, *, after_s: float = 0.0) -> None:
        """Ask all instances, because events of any of them may be missing: `after_s` from now at the
        earliest, and `ASK_ALL_PAUSE_S` after the last time."""
        if self._closed:
            return

        def ask_all_now() -> None:
            self._all_timer = None
            self._all_asked_at = time.monotonic()
            instance_ids = self._client.known_ids()
            random.shuffle(instance_ids)  # other routers ask them at the same time
            for instance_id in instance_ids:
                self.ask(instance_id)

        now = time.monotonic()
        due_at = max(now + after_s, self._all_asked_at + ASK_ALL_PAUSE_S)
        if self._all_timer is not None:
            if self._all_due_at <= due_at:
                return
            self._all_timer.cancel()
        self._all_due_at = due_at
        self._all_timer = asyncio.get_running_loop().call_later(due_at - now, ask_all_now)

    def asking(self) -> list[int]:
        """Return the ids of the instances that have not answered yet."""
        return list(self._tasks)

    def forget(self, instance_id: int) -> None:
        """Stop asking an instance."""
        task = self._tasks.pop(instance_id, None)
        if task is not None:
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            self._sent.discard(instance_id)
            self._note_idle()

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait until no instance is being asked. Return False if that takes longer than `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def aclose(self) -> None:
        """End all asks."""
        self._closed = True
        if self._all_timer is not None:
            self._all_timer.cancel()
            self._all_timer = None
        tasks = [*self._tasks.values(), *self._ending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ----------------------------------------------------------------- asking

    async def _ask_once(self, instance_id: int) -> str | None:
        """Ask an instance; return None if its answer was applied, else the reason why not."""
        reader, loop = self._ledger.begin_ask(instance_id), asyncio.get_running_loop()
        self._sent.add(instance_id)
        try:
            async with (
                asyncio.timeout(ANSWER_S) as deadline,
                await self._client.direct({"have": reader.have}, instance_id, annotated=False) as call,
            ):
                began_at = time.monotonic()
                async for item in call:
                    self._check_plane(item)
                    reader.apply(item)
                    block_size = item.get("block_size")
                    if self._on_block_size is not None and type(block_size) is int and block_size > 0:
                        self._on_block_size(instance_id, block_size)
                    if time.monotonic() - began_at > SLICE_S:
                        await asyncio.sleep(0)
                        began_at = time.monotonic()
                    deadline.reschedule(loop.time() + ANSWER_S)
            if reader.finish():
                self._again.add(instance_id)
        except (PlaneError, InvalidRecord) as exc:
            reader.fail()
            return f"{type(exc).__name__}: {exc}"
        except TimeoutError:
            reader.fail()
            return f"no answer within {ANSWER_S:g} s"
        except Exception as exc:
            # If the task ended here the worker would count as asked for ever, with its events held.
            log.exception("the answer of worker %x cannot be applied", instance_id)
            reader.fail()
            return f"{type(exc).__name__}: {exc}"
        except BaseException:
            reader.fail()
            raise
        finally:
            self._sent.discard(instance_id)
        return None

    def _check_plane(self, item: Any) -> None:
        """Check that the events of the worker that sent this item arrive here. Raises InvalidRecord."""
        worker_plane = item.get("event_plane") if isinstance(item, dict) else None
        if worker_plane is None:
            return
        if worker_plane != self._event_plane:
            raise InvalidRecord(
                "an answer to this router",
                f"it publishes by {worker_plane}, but this router follows by {self._event_plane}:"
                " set DYN_EVENT_PLANE alike",
            )
        if (count := item.get("event_shards", 1)) != self._shards_count:
            raise InvalidRecord(
                "an answer to this router",
                f"it publishes over {count} streams, but this router follows {self._shards_count}:"
                " set DYN_EVENT_SHARDS alike",
            )

    def _note_idle(self) -> None:
        if not self._tasks:
            self._idle.set()
