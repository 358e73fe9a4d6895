"""A process's link through Redis: a stream of its own for what it receives, and appends to those of others.

Each process removes what it has read, and keeps its stream's expiry ahead while it lives. An append makes no
stream that is not there, so messages to a process that has ended are refused at once, and nothing runs later.
Workers read requests and append to replies, callers the other way round: the keys are named so that Redis can
hold its users to that.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from contextlib import suppress
from typing import Final

from dynamo_redis.backoff import Backoff
from dynamo_redis.config import RedisLogin
from dynamo_redis.errors import CannotConnect, StoreError
from dynamo_redis.planes.base import Describe
from dynamo_redis.planes.tunnel.link import BEHIND_COUNT, LinkOwner
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.store.keys import Inbox, inbox_key, inbox_pattern
from dynamo_redis.store.redis.blocking import pack
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.wire.tunnel import encode_part

EXPIRY_S: Final = 30.0
"""Seconds after which the stream of a process that has ended is removed."""

_BLOCK_S: Final = 1.0
_READ_COUNT: Final = 256
_CONTENT_BYTES: Final = 256 << 10
_TRIP_BYTES: Final = 1 << 20
_FLUSH_S: Final = 1.0

_log = logging.getLogger(__name__)


class RedisLink:
    """Implements `Link`. It owns a task that reads and one that sends, each with a connection."""

    def __init__(
        self,
        url: str,
        timeout_s: float,
        prefix: str,
        name: str,
        reads: Inbox,
        login: RedisLogin | None = None,
    ) -> None:
        """`name` is unique among the processes of the deployment, whose keys have the prefix. A worker reads
        requests, a caller replies."""
        self._client = open_client(url, timeout_s=timeout_s, client_name="dynamo-redis-plane", login=login)
        self._prefix = prefix
        self._user = encode_part(self._client.user)
        self._address = f"{self._user}.{name}"
        self._reads: Inbox = reads
        self._writes: Inbox = "replies" if reads == "requests" else "requests"
        self._key = inbox_key(prefix, reads, self._address)
        self._owner: LinkOwner
        self._position = b"0-0"
        self._is_up = False
        self._is_open = False
        self._loss = ""
        self._waiting: list[tuple[str, bytes, bytes]] = []
        self._wake = asyncio.Event()
        self._is_drained = asyncio.Event()
        self._is_drained.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._complaints = RateLimitedLog(_log)

    @property
    def address(self) -> str:
        """See `Link.address`: the Redis user and the name of the process, never a key, so that no record or
        message can have a process write to another key."""
        return self._address

    @property
    def content_bytes(self) -> int:
        """See `Link.content_bytes`."""
        return _CONTENT_BYTES

    async def open(self, owner: LinkOwner) -> None:
        """See `Link.open`."""
        if self._is_open:
            if not self._is_up:
                raise CannotConnect(self._loss)
            return
        self._owner = owner
        try:
            await self._create()
        except StoreError as exc:
            raise CannotConnect(self._explain(exc)) from exc
        self._is_open = self._is_up = True
        self._tasks = [
            asyncio.create_task(self._read(), name=f"reader of {self._key}"),
            asyncio.create_task(self._send_waiting(), name=f"sender to others of {self._key}"),
        ]

    async def _create(self) -> None:
        """Create the stream, empty, by all commands that the reader needs, so that a missing right shows
        now. Raises StoreError."""
        commands = (
            ("UNLINK", self._key),  # also one whose ids a sender has used up
            ("XADD", self._key, "MAXLEN", 0, "*", "f", ""),
            ("PEXPIRE", self._key, round(EXPIRY_S * 1000)),
            ("XREAD", "COUNT", 1, "STREAMS", self._key, "0-0"),
            ("XTRIM", self._key, "MAXLEN", 0),
        )
        _, self._position, *_ = await self._client.pipeline(commands, transaction=True)

    def send(self, receiver: str, connection_id: bytes, message: bytes) -> None:
        """See `Link.send`."""
        if self._is_up:
            self._waiting.append((receiver, connection_id, message))
            self._is_drained.clear()
            self._wake.set()

    @property
    def is_behind(self) -> bool:
        """See `Link.is_behind`."""
        return len(self._waiting) >= BEHIND_COUNT

    async def announce(self, describe: Describe) -> None:
        """See `Link.announce`: Redis has no tools for services."""

    async def _send_waiting(self) -> None:
        """Append the messages that wait: one entry for each receiver and trip."""
        connection = self._client.sending()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._waiting:
                    trip = self._take_trip()
                    commands = []
                    for receiver, messages in trip.items():
                        key = inbox_key(self._prefix, self._writes, receiver)
                        head = ("XADD", key, "NOMKSTREAM", "*", "f", self._address)
                        commands.append((key, pack(*head, *_fields(messages))))
                    try:
                        answers = await connection.execute_each(commands)
                    except StoreError as exc:
                        self._lose(exc)
                        continue
                    for answer, (receiver, messages) in zip(answers, trip.items(), strict=True):
                        if isinstance(answer, StoreError):
                            self._refuse(receiver, messages, answer)
                        elif answer is None:
                            for connection_id, _ in messages:
                                self._owner.on_unreachable(connection_id)
                self._is_drained.set()
        finally:
            await connection.aclose()

    def _refuse(self, receiver: str, messages: list[tuple[bytes, bytes]], error: StoreError) -> None:
        """End the connections whose messages Redis refuses."""
        reason = self._explain(error)
        self._complaints.log("a message to %s was not sent: %s", receiver, reason, kind=error.answer_code)
        for connection_id, _ in messages:
            self._owner.on_unreachable(connection_id, reason)

    def _explain(self, error: StoreError) -> str:
        """Return the text of an error; with the rules that the user needs, if Redis denied a command."""
        if error.answer_code != "NOPERM":
            return str(error)
        return (
            f"{error}; on this plane the user {self._user} needs"
            f" (+xadd %W~{inbox_pattern(self._prefix, self._writes)})"
            f" (+xadd +xread +xtrim +pexpire +unlink"
            f" ~{inbox_pattern(self._prefix, self._reads, self._user)})"
        )

    def _take_trip(self) -> dict[str, list[tuple[bytes, bytes]]]:
        """Return the messages of one round trip, by receiver, in order."""
        trip: dict[str, list[tuple[bytes, bytes]]] = defaultdict(list)
        size_bytes = count = 0
        for receiver, connection_id, message in self._waiting:
            if size_bytes and size_bytes + len(message) > _TRIP_BYTES:
                break
            size_bytes += len(message)
            count += 1
            trip[receiver].append((connection_id, message))
        del self._waiting[:count]
        return trip

    async def _read(self) -> None:
        """Read the own stream, remove what was read, and keep its expiry ahead."""
        loop = asyncio.get_running_loop()
        connection = self._client.blocking(self._key)
        backoff = Backoff()
        renew_at = loop.time() + EXPIRY_S / 3
        expire = pack("PEXPIRE", self._key, round(EXPIRY_S * 1000))
        try:
            while True:
                try:
                    if not self._is_up:
                        await self._create()
                        self._is_up = True
                        renew_at = loop.time() + EXPIRY_S / 3
                        backoff.reset()
                        _log.info("messages arrive through Redis at %s again", self._client.address)
                    read = pack(
                        "XREAD", "COUNT", _READ_COUNT, "BLOCK", round(_BLOCK_S * 1000),
                        "STREAMS", self._key, self._position,
                    )  # fmt: skip
                    commands = [read]
                    if loop.time() >= renew_at:
                        renew_at = loop.time() + EXPIRY_S / 3
                        commands.insert(0, expire)
                    *renewed, found = await connection.execute_all(commands, block_s=_BLOCK_S)
                    if renewed == [0]:
                        self._lose("the stream of this process was removed")
                        continue
                    if found:
                        entries = found[0][1]
                        self._position = entries[-1][0]
                        for _, fields in entries:
                            self._hand_over(fields)
                        await connection.execute(
                            pack("XTRIM", self._key, "MINID", _behind(self._position)), block_s=0.0
                        )
                except StoreError as exc:
                    self._lose(exc)
                    await self._client.pause(backoff.next_s())
        finally:
            await connection.aclose()

    def _hand_over(self, fields: list[bytes]) -> None:
        """Hand the messages of an entry to the owner. Fields of other names are ignored."""
        sender = ""
        for name, value in zip(fields[::2], fields[1::2], strict=False):
            if name == b"f":
                sender = value.decode("utf-8", "replace")
            elif name == b"m":
                self._owner.on_message(value, sender)

    def _lose(self, reason: StoreError | str) -> None:
        """End all connections: what was on its way may be lost."""
        text = self._explain(reason) if isinstance(reason, StoreError) else reason
        self._loss = f"messages through Redis at {self._client.address} may be lost: {text}"
        if self._is_up:
            _log.warning("%s", self._loss)
        self._is_up = False
        self._waiting.clear()
        self._owner.on_lost(self._loss)

    async def aclose(self) -> None:
        """See `Link.aclose`."""
        self._is_up = False
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await self._is_drained.wait()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
            try:
                await self._client.execute("UNLINK", self._key)
            except StoreError as exc:
                _log.debug("the stream of this process expires by itself: %s", exc)
        await self._client.aclose()


def _fields(messages: list[tuple[bytes, bytes]]) -> list[bytes]:
    fields: list[bytes] = []
    for _, message in messages:
        fields += (b"m", message)
    return fields


def _behind(entry_id: bytes) -> bytes:
    """Return the id behind an entry's."""
    ms, _, number = entry_id.partition(b"-")
    return b"%b-%d" % (ms, int(number) + 1)
