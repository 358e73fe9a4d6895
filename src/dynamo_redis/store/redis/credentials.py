"""Users and passwords of Redis that change while a process lives.

All clients of a process with the same `RedisLogin` share one `CredentialSource`. It has a thread with an
event loop of its own, so that the keepalive thread does not depend on the application's event loop. The
thread

- reads files each second, and asks a provider before its token ends (`RENEW_AT` of the time left), each
  within `ASK_TIMEOUT_S`;
- after a failure goes on with the last credentials, and tries again with growing pauses;
- asks once more when a server refuses the present credentials: the password may have changed a moment ago.

Connections compare their version with `CredentialSource.version` before each use, and send AUTH if it has
grown. An AUTH that is refused leaves a connection logged in as before.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Any, Final

from redis.credentials import CredentialProvider

from dynamo_redis.backoff import Backoff
from dynamo_redis.config import RedisLogin
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.store.redis.credential_origins import (
    Credentials,
    FileOrigin,
    Origin,
    ProviderOrigin,
    shown_failure,
)
from dynamo_redis.store.redis.own_thread import OwnThread
from dynamo_redis.store.redis.server_errors import RouteError

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S: Final = 10.0
"""Longest wait for a provider."""
RENEW_AT: Final = 0.75
"""The part of the time to their end after which credentials are renewed, less up to a tenth by chance."""
RETRY_FIRST_S: Final = 1.0
RETRY_CAP_S: Final = 30.0
"""Pauses after failures, and between questions that refusals of servers cause."""
SOONEST_S: Final = 0.5
"""Shortest time between two questions without a failure."""

_log: Final = RateLimitedLog(logger, pause_s=60.0)


class CredentialSource(OwnThread[RedisLogin]):
    """The present user and password. Made by `shared`; safe from any thread."""

    def __init__(self, login: RedisLogin) -> None:
        """Raises ConfigError for a provider that does not exist."""
        super().__init__(login)
        self._origin: Origin = FileOrigin(login) if login.provider is None else ProviderOrigin(login)
        self._origin.on_change = self._on_change
        self._current: Credentials | None = None
        self._version = 0
        self._asking: asyncio.Task[None] | None = None
        self._failure: RouteError | None = None
        self._retries = Backoff(RETRY_FIRST_S, RETRY_CAP_S)
        self._retry_at = 0.0
        self._refusals = Backoff(RETRY_FIRST_S, RETRY_CAP_S)
        self._refusal_counts_at = 0.0
        self._wake = asyncio.Event()

    @property
    def thread_name(self) -> str:
        return "credentials of Redis"

    @property
    def name(self) -> str:
        """The origin of the credentials, for messages."""
        return self._origin.name

    @property
    def version(self) -> int:
        """Grows when user or password become other ones; 0 before the first."""
        return self._version

    @property
    def known(self) -> Credentials | None:
        """The present credentials, if they have been read already."""
        return self._current

    # ------------------------------------------------------------------ from any thread

    async def current(self) -> Credentials:
        """Return the present credentials. Raises RouteError without any. Cancelling it is safe."""
        if self._current is not None:
            return self._current
        return await self.run(self._first())

    def current_in_thread(self) -> Credentials:
        """As `current`, for a thread."""
        if self._current is not None:
            return self._current
        try:
            return self.run_in_thread(self._first(), ASK_TIMEOUT_S)
        except TimeoutError as exc:
            raise RouteError(f"{self.name} does not answer in time") from exc

    async def renewed(self, refused: int) -> bool:
        """Ask again, since a server refuses the credentials of a version. Return whether there are newer
        ones. Cancelling it is safe."""
        if self._version == refused:
            await self.run(self._ask_after_refusal(refused))
        return self._version != refused

    def renewed_in_thread(self, refused: int) -> bool:
        """As `renewed`, for a thread."""
        if self._version == refused:
            try:
                self.run_in_thread(self._ask_after_refusal(refused), ASK_TIMEOUT_S)
            except TimeoutError:
                return False
        return self._version != refused

    # ------------------------------------------------------------------ in the thread

    async def _keep(self) -> None:
        """Read the credentials anew, before they end and after failures."""
        while True:
            try:
                await self._renew()
                wait_s = self._pause_s()
            except RouteError:
                wait_s = max(0.1, self._retry_at - time.monotonic())
            while await self._is_woken(wait_s):
                wait_s = self._pause_s()

    async def _is_woken(self, wait_s: float) -> bool:
        """Return True once there are other credentials, False after a time."""
        try:
            async with asyncio.timeout(wait_s):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        return True

    def _pause_s(self) -> float:
        """Return the time until the credentials are read again."""
        end = None if self._current is None else self._current.expires_at
        if end is None or isinstance(self._origin, FileOrigin):
            return self._origin.check_s * random.uniform(0.9, 1.0)  # noqa: S311 - jitter
        left_s = end - time.time()
        return max(SOONEST_S, left_s * RENEW_AT * random.uniform(0.9, 1.0))  # noqa: S311 - jitter

    async def _first(self) -> Credentials:
        """Return the present credentials, read now if there are none. Raises RouteError."""
        if self._current is None:
            if self._failure is not None and time.monotonic() < self._retry_at:
                raise self._failure
            await self._renew()
        assert self._current is not None
        return self._current

    async def _ask_after_refusal(self, refused: int) -> None:
        """Read the credentials anew, unless they were just read for a refusal."""
        now = time.monotonic()
        if self._version != refused or now < self._refusal_counts_at:
            return
        self._refusal_counts_at = now + self._refusals.next_s()
        try:
            await self._renew()
        except RouteError:
            return
        self._wake.set()

    async def _renew(self) -> None:
        """Read the credentials; callers at the same time share the answer. Raises RouteError."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._read())
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._asking)

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                found = await self._origin.read()
            if found.expires_at is not None and found.expires_at <= time.time():
                raise RouteError("its credentials have ended already")
        except Exception as exc:  # noqa: BLE001 - a provider may raise anything
            reason = shown_failure(exc)
            after = "" if self._current is None else ", going on with the last ones"
            _log.log("no credentials of Redis from %s%s: %s", self.name, after, reason, kind=self.name)
            self._failure = RouteError(f"no credentials of Redis from {self.name}: {reason}")
            self._retry_at = time.monotonic() + self._retries.next_s()
            raise self._failure from None
        self._failure = None
        self._retries.reset()
        self._take(found)

    def _take(self, found: Credentials) -> None:
        """Make credentials the present ones."""
        before, self._current = self._current, found
        if before is None or before.words != found.words:
            self._version += 1
            self._refusals.reset()
            if before is not None:
                logger.info("new credentials of Redis from %s", self.name)

    def _on_change(self, found: Credentials) -> None:
        """Take credentials that the origin brings. From any thread."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._brought, found)

    def _brought(self, found: Credentials) -> None:
        self._take(found)
        self._wake.set()


class SharedCredentials(CredentialProvider):
    """Gives redis-py the present credentials of a login, when it makes a connection."""

    def __init__(self, login: RedisLogin) -> None:
        self._login = login

    async def get_credentials_async(self) -> Any:
        """Return the arguments of AUTH. Raises RouteError."""
        source = CredentialSource.shared(self._login)
        try:
            return (await source.current()).words
        finally:
            source.release()

    def get_credentials(self) -> Any:
        """As `get_credentials_async`, for a thread."""
        source = CredentialSource.shared(self._login)
        try:
            return source.current_in_thread().words
        finally:
            source.release()
