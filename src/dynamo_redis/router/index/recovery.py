"""Asks workers what they hold: those of whom something is missing, and all when anything may be.

An ask is one request to the worker's `kv_dump` endpoint. It says how far each rank has been applied, and the
worker answers with what followed, or with all its blocks. Asks that succeed cost next to nothing when nothing
is missing, so there is one cure for every doubt.
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
from dynamo_redis.router.index.ledger import Answer, Ledger
from dynamo_redis.runtime.client import Client

log = logging.getLogger(__name__)

ASKS_AT_ONCE_COUNT: Final = 8
"""Few enough that answers do not crowd out requests, enough that slow workers hold up few."""

RETRIES_AT_ONCE_COUNT: Final = 2
"""Those who have not answered before must not keep others from being asked."""

ANSWER_S: Final = 5.0
"""Longest wait for an answer's first item, and for each further one."""

DOUBT_PAUSE_S: Final = 1.0
"""Shortest time between two asks of everybody. One that comes early waits: its answer covers all before."""

SLICE_S: Final = 0.002
"""How long events are applied before others get their turn of the event loop."""

_RETRY_S: Final = (0.1, 5.0)

OnBlockSize = Callable[[int, int], None]
"""Is told of an instance how many tokens its KV blocks have."""


class Recovery:
    """One task for each instance that is being asked (single flight), `ASKS_AT_ONCE_COUNT` of them at work,
    and `RETRIES_AT_ONCE_COUNT` of those that are asked again, after growing, jittered pauses.

    They end with an answer, by `forget`, or all by `aclose`.
    """

    def __init__(
        self, ledger: Ledger, client: Client, event_plane: str, on_block_size: OnBlockSize | None = None
    ) -> None:
        """`event_plane` is the one that is followed: a worker that sends its events by another is taken to
        hold nothing, since nothing would be heard of it after its answer. `on_block_size` is told how large
        the blocks of each instance are that answers."""
        self.recovered_count = 0
        """Asks that were answered."""
        self.failed_count = 0
        """Asks that were not."""
        self._ledger = ledger
        self._client = client
        self._event_plane = event_plane
        self._on_block_size = on_block_size
        self._slots = asyncio.Semaphore(ASKS_AT_ONCE_COUNT)
        self._retry_slots = asyncio.Semaphore(RETRIES_AT_ONCE_COUNT)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._sent: set[int] = set()
        self._again: set[int] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._doubt: asyncio.TimerHandle | None = None
        self._doubt_due_at = 0.0
        self._doubted_at = -DOUBT_PAUSE_S
        self._closed = False

    # ----------------------------------------------------------------- whom to ask

    def ask(self, instance_id: int) -> None:
        """Ask an instance now; once more if it is being asked, since that answer may be too old."""
        if self._closed:
            return
        if instance_id in self._sent:
            self._again.add(instance_id)
        if instance_id not in self._tasks:
            task = asyncio.create_task(self._ask_until_known(instance_id), name=f"ask {instance_id:x}")
            self._tasks[instance_id] = task
            self._idle.clear()

    def ask_all(self, *, after_s: float = 0.0) -> None:
        """Something may be missing of anybody: ask all, `after_s` from now, and `DOUBT_PAUSE_S` after the
        last time."""
        if self._closed:
            return
        now = time.monotonic()
        due_at = max(now + after_s, self._doubted_at + DOUBT_PAUSE_S)
        if self._doubt is not None:
            if self._doubt_due_at <= due_at:
                return
            self._doubt.cancel()
        self._doubt_due_at = due_at
        self._doubt = asyncio.get_running_loop().call_later(due_at - now, self._ask_all_now)

    def _ask_all_now(self) -> None:
        self._doubt = None
        self._doubted_at = time.monotonic()
        instance_ids = self._client.known_ids()
        random.shuffle(instance_ids)  # other routers ask them at the same time
        for instance_id in instance_ids:
            self.ask(instance_id)

    def asking(self) -> list[int]:
        """Whom an answer is awaited from."""
        return list(self._tasks)

    def forget(self, instance_id: int) -> None:
        """Ask an instance no more."""
        task = self._tasks.pop(instance_id, None)
        if task is not None:
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            self._sent.discard(instance_id)
            self._note_idle()

    async def settle(self, timeout_s: float) -> bool:
        """Wait until nobody is being asked; answers whether that is so."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def aclose(self) -> None:
        """End all asks."""
        self._closed = True
        if self._doubt is not None:
            self._doubt.cancel()
            self._doubt = None
        tasks = [*self._tasks.values(), *self._ending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ----------------------------------------------------------------- asking

    async def _ask_until_known(self, instance_id: int) -> None:
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
                # One line a state change: it is silent now, and it will be heard of when it answers.
                level = logging.WARNING if failure_count == 2 else logging.DEBUG
                log.log(level, "worker %x does not say what it holds, asking on: %s", instance_id, failure)
                await asyncio.sleep(backoff.next_s())
        finally:
            if self._tasks.get(instance_id) is asyncio.current_task():
                del self._tasks[instance_id]
                self._note_idle()

    async def _ask_once(self, instance_id: int) -> str | None:
        """None if the instance is known now; else why it is not."""
        answer = self._ledger.begin_ask(instance_id)
        self._sent.add(instance_id)
        try:
            await self._read(answer)
            if answer.finish():
                self._again.add(instance_id)
        except (PlaneError, InvalidRecord) as exc:
            answer.fail()
            return f"{type(exc).__name__}: {exc}"
        except TimeoutError:
            answer.fail()
            return f"no answer within {ANSWER_S:g} s"
        except Exception as exc:
            # A task that ended here would leave the worker asked for ever, with its events held.
            log.exception("the answer of worker %x cannot be taken", instance_id)
            answer.fail()
            return f"{type(exc).__name__}: {exc}"
        except BaseException:
            answer.fail()
            raise
        finally:
            self._sent.discard(instance_id)
        return None

    async def _read(self, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(ANSWER_S) as deadline:
            call = await self._client.direct({"have": answer.have}, answer.instance_id, annotated=False)
            async with call:
                began_at = time.monotonic()
                async for item in call:
                    self._check_plane(item)
                    answer.take(item)
                    self._note_block_size(answer.instance_id, item)
                    if time.monotonic() - began_at > SLICE_S:
                        await asyncio.sleep(0)
                        began_at = time.monotonic()
                    deadline.reschedule(loop.time() + ANSWER_S)

    def _check_plane(self, item: Any) -> None:
        theirs = item.get("event_plane") if isinstance(item, dict) else None
        if theirs not in (None, self._event_plane):
            raise InvalidRecord(
                "an answer to this router",
                f"it publishes by {theirs}, but this router follows by {self._event_plane}:"
                " set DYN_EVENT_PLANE alike",
            )

    def _note_block_size(self, instance_id: int, item: dict[str, Any]) -> None:
        block_size = item.get("block_size")
        if self._on_block_size is not None and type(block_size) is int and block_size > 0:
            self._on_block_size(instance_id, block_size)

    def _note_idle(self) -> None:
        if not self._tasks:
            self._idle.set()
