"""The primary that Redis Sentinels name, and the news that it is another one.

All clients of a process with the same URL share one `SentinelRoute`. It has a thread with an event loop of
its own, so that the keepalive thread does not depend on the application's event loop. The thread

- asks all sentinels at once when a connection is made (`SENTINEL GET-MASTER-ADDR-BY-NAME`, which names a
  promoted replica earlier than `SENTINEL MASTERS` does, by which redis-py asks);
- stays subscribed to each sentinel's announcements. They are only a hint: upon one, all sentinels are asked.

Sentinels may be down, be cut off from the others, or have missed a failover. So the answer with the highest
configuration epoch counts, an answer of an earlier epoch than the known one counts only after the known
primary could not be reached, and if no sentinel answers, the known primary is tried. A sentinel that hangs
costs a connection `OTHERS_WAIT_S` at most.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import StoreRefused
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.store.redis.own_thread import OwnThread
from dynamo_redis.store.redis.route import Route
from dynamo_redis.store.redis.server_errors import (
    FAILURES,
    RouteError,
    drop,
    drop_upon_failures,
    is_about_password,
    one_line,
    prepare,
    reply,
    store_error,
)
from dynamo_redis.store.redis.url import Address, ServerUrl, make_connection, show_address

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S: Final = 0.5
"""Longest wait for a sentinel's answer, connecting included."""
OTHERS_WAIT_S: Final = 0.1
"""Longest wait for the other sentinels after the first has named a primary."""
PING_S: Final = 5.0
"""Interval at which a silent sentinel is checked."""
MOST_NAMES_COUNT: Final = 10

_ANNOUNCEMENTS: Final = ("+switch-master", "+promoted-slave")

_log: Final = RateLimitedLog(logger, pause_s=60.0)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A sentinel's answer. `names` are the masters that it knows, if it does not know the wanted one."""

    at: Address | None
    epoch: int = 0
    names: tuple[str, ...] = ()


class SentinelRoute(OwnThread[ServerUrl], Route):
    """Leads to the primary that the sentinels of a URL name. Made by `shared`."""

    needs_primary = True

    def __init__(self, url: ServerUrl) -> None:
        super().__init__(url)
        self._url = url
        self._primary: Address | None = None
        self._config_epoch = 0
        self._asking: asyncio.Task[Address] | None = None

    @property
    def thread_name(self) -> str:
        return f"sentinels of {self._url.master_name}"

    @property
    def address(self) -> str:
        name, primary = self._url.master_name, self._primary
        if primary is not None:
            return f"{show_address(primary)} ({name})"
        return f"{name} of {', '.join(map(show_address, self._url.sentinels))}"

    # ------------------------------------------------------------------ from any thread

    async def find(self) -> Address | None:
        return await self.run(self._find())

    def find_in_thread(self, timeout_s: float) -> Address | None:
        try:
            return self.run_in_thread(self._find(), timeout_s)
        except TimeoutError as exc:
            raise RouteError("the sentinels do not answer in time") from exc

    def failed(self, at: Address) -> None:
        # Answers of an earlier epoch count from now on: the sentinels may have been set up anew.
        if at == self._primary:
            self._config_epoch = 0

    # ------------------------------------------------------------------ in the thread

    async def _keep(self) -> None:
        await asyncio.gather(*(self._watch(sentinel) for sentinel in self._url.sentinels))

    async def _find(self) -> Address:
        """Ask the sentinels; callers at the same time share the answers."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
            self._asking.add_done_callback(_take_exception)
        return await asyncio.shield(self._asking)

    async def _ask(self) -> Address:
        """Ask all sentinels, note the primary, and return it."""
        answers, failures = await self._answers()
        named = [answer for answer in answers if answer.at is not None]
        best = max(named, key=lambda answer: answer.epoch, default=None)
        known = self._primary
        if best is not None and best.at is not None and (known is None or best.epoch >= self._config_epoch):
            self._config_epoch = best.epoch
            self._note_primary(best.at)
            return best.at
        if known is None:
            raise self._nothing_found(answers, failures)
        if best is None:
            _log.log(
                "no sentinel names the primary of %s, going on with %s",
                self._url.master_name,
                show_address(known),
                kind=self._url.master_name,
            )
        return known

    async def _answers(self) -> tuple[list[_Answer], dict[Address, Exception]]:
        """Return the answers that come in time, and the failures of the other sentinels."""
        asked = {asyncio.create_task(self._ask_one(one)): one for one in self._url.sentinels}
        answers: list[_Answer] = []
        failures: dict[Address, Exception] = {}
        waiting, limit_s = set(asked), ASK_TIMEOUT_S
        try:
            while waiting:
                done, waiting = await asyncio.wait(
                    waiting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                for task in done:
                    try:
                        answers.append(task.result())
                    except Exception as exc:  # noqa: BLE001 - what answers may be no sentinel
                        failures[asked[task]] = exc
                if any(answer.at is not None for answer in answers):
                    limit_s = OTHERS_WAIT_S
        finally:
            for task in waiting:
                task.cancel()
        return answers, failures

    async def _ask_one(self, sentinel: Address) -> _Answer:
        """Return a sentinel's answer. Raises one of FAILURES."""
        name = self._url.master_name
        async with asyncio.timeout(ASK_TIMEOUT_S):
            connection = await self._connect(sentinel)
            try:
                at = await _call(connection, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)
                masters = [_pairs(one) for one in await _call(connection, "SENTINEL", "MASTERS")]
            finally:
                drop(connection)
        if at is None:
            return _Answer(None, names=tuple(one.get("name", "?") for one in masters))
        epochs = (one.get("config-epoch", "0") for one in masters if one.get("name") == name)
        return _Answer((at[0].decode(), int(at[1])), int(next(epochs, "0")))

    async def _connect(self, sentinel: Address) -> Any:
        """Return a connection to a sentinel. Raises one of FAILURES."""

        async def log_in(connection: Any) -> None:
            prepare(connection)
            await connection.on_connect()

        options = self._url.sentinel_options(sentinel) | {
            "socket_timeout": None,
            "socket_connect_timeout": ASK_TIMEOUT_S,
            "health_check_interval": 0,
            "decode_responses": False,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "redis_connect_func": log_in,
        }
        connection = make_connection(options)
        drop_upon_failures(connection)
        try:
            await connection.connect()
        except BaseException:
            drop(connection)
            raise
        return connection

    def _note_primary(self, at: Address) -> None:
        before, self._primary = self._primary, at
        if before is not None and before != at:
            logger.warning(
                "the primary of %s is now %s, it was %s",
                self._url.master_name,
                show_address(at),
                show_address(before),
            )
            self._moved()

    def _nothing_found(self, answers: Sequence[_Answer], failures: Mapping[Address, Exception]) -> Exception:
        """Return the error for sentinels that name no primary."""
        where = ", ".join(map(show_address, self._url.sentinels))
        if answers:
            names = sorted({name for answer in answers for name in answer.names})
            known = ", ".join(names[:MOST_NAMES_COUNT]) or "none"
            return RouteError(
                f"the sentinels at {where} know no master {self._url.master_name} (DYN_REDIS_URL), they know"
                f" {known}",
                refused=True,
            )
        refused = next((exc for exc in failures.values() if reply(exc) is not None), None)
        if refused is not None:
            hint = " (the user and password of sentinels are sentinel_username and sentinel_password)"
            hint *= is_about_password(refused)
            return RouteError(
                f"the sentinels at {where} refuse to answer: {reply(refused)}{hint}", refused=True
            )
        if not failures:
            return RouteError(f"no sentinel of {where} answers in time")
        sentinel, failure = next(iter(failures.items()))
        why = store_error(failure, show_address(sentinel))
        return RouteError(f"no sentinel of {where} answers: {why}", refused=isinstance(why, StoreRefused))

    # ------------------------------------------------------------------ announcements

    async def _watch(self, sentinel: Address) -> None:
        """Follow a sentinel's announcements."""
        backoff = Backoff()
        while True:
            connection: Any = None
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    connection = await self._connect(sentinel)
                    await connection.send_command("SUBSCRIBE", *_ANNOUNCEMENTS)
                    for _ in _ANNOUNCEMENTS:
                        await connection.read_response()
                backoff.reset()
                await self._hint()  # for announcements before the subscription
                while True:
                    await self._next_announcement(connection)
                    await self._hint()
            except FAILURES as exc:
                logger.debug("sentinel %s: %s", show_address(sentinel), one_line(exc))
            except Exception:
                logger.exception("sentinel %s cannot be followed, trying again", show_address(sentinel))
            finally:
                if connection is not None:
                    drop(connection)
            await asyncio.sleep(backoff.next_s())

    async def _next_announcement(self, connection: Any) -> None:
        """Wait for an announcement about this master. Raises one of FAILURES if the sentinel is silent."""
        name = self._url.master_name
        while True:
            message = await connection.read_response(timeout=PING_S)
            if message is None:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    await connection.send_command("PING", check_health=False)
                    message = await connection.read_response()
            words = message[-1].decode("utf-8", "replace").split(" ") if message[0] == b"message" else ()
            if name in words:
                return

    async def _hint(self) -> None:
        """Ask the sentinels anew: answers under way may be older than the announcement."""
        with suppress(*FAILURES):
            if self._asking is not None:
                await asyncio.wait([self._asking])
            await self._find()


def _take_exception(asking: asyncio.Task[Address]) -> None:
    """Take the exception of a task whose callers may all have been cancelled."""
    if not asking.cancelled():
        asking.exception()


async def _call(connection: Any, *words: str) -> Any:
    await connection.send_command(*words)
    return await connection.read_response()


def _pairs(flat: Sequence[bytes]) -> dict[str, str]:
    texts = [word.decode("utf-8", "replace") for word in flat]
    return dict(zip(texts[::2], texts[1::2], strict=False))
