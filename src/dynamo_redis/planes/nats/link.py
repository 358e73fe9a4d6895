"""A process's link to NATS: one subject of its own, and core NATS messages to the subjects of others.

Nothing is stored. The server drops a message that no process receives, and tells the sender at once (status
503, "no responders"). Each message names its connection in the reply subject, `<own subject>.<connection>`,
so that the status finds its way to it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from contextlib import suppress
from functools import partial
from typing import Final, Literal

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from dynamo_redis.backoff import Backoff
from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import CannotConnect, ConfigError
from dynamo_redis.planes.base import Describe
from dynamo_redis.planes.nats.login import SafeClient, check_server, explain, login_options
from dynamo_redis.planes.tunnel.link import BEHIND_COUNT, LinkOwner
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.wire.tunnel import HEAD_BYTES

MAX_MESSAGE_BYTES: Final = 16 << 20
"""The largest request or item of this plane."""

_NO_RESPONDERS: Final = "503"
_RECONNECT_S: Final = 1
_PING_S: Final = 5
_FLUSH_S: Final = 1.0
_NO_LIMIT: Final = 1 << 31
"""The client's own limits of unread messages, which drop them. The windows of the connections bound them."""
_MINIMUM_VERSION: Final = (2, 2)
"""The first version that says that a subject has no responders."""

_log = logging.getLogger(__name__)


class NatsLink:
    """Implements `Link`. It owns the tasks of the client, one that sends, and one that replaces a client that
    has given up."""

    def __init__(self, settings: PlaneSettings, subject: str, name: str) -> None:
        """`subject` is the link's own; `name` shows in the server's list of connections. Raises
        ConfigError."""
        self._settings = settings
        self._subject = subject
        self._space = subject[: subject.rindex(".") + 1]
        self._name = name
        self._server = check_server(settings)
        login_options(settings)  # so that a wrong setting shows at the start
        self._client: SafeClient | None = None
        self._owner: LinkOwner
        self._is_up = False
        self._is_closing = False
        self._waiting: deque[tuple[str, str, bytes]] = deque()
        self._wake = asyncio.Event()
        self._is_drained = asyncio.Event()
        self._is_drained.set()
        self._sender: asyncio.Task[None] | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._describe: Describe | None = None
        self._complaints = RateLimitedLog(_log)

    @property
    def address(self) -> str:
        """See `Link.address`."""
        return self._subject

    @property
    def content_bytes(self) -> int:
        """See `Link.content_bytes`."""
        assert self._client is not None
        return int(self._client.max_payload) - HEAD_BYTES

    async def open(self, owner: LinkOwner) -> None:
        """See `Link.open`."""
        if self._client is not None:
            if not self._is_up:
                raise CannotConnect(f"the connection to NATS at {self._server} is lost")
            return
        self._owner = owner
        self._client = await self._new_client()
        self._is_up = True
        self._sender = asyncio.create_task(self._send_waiting(), name=f"NATS link of {self._subject}")

    async def _new_client(self) -> SafeClient:
        """Return a client that is connected. Raises CannotConnect or ConfigError."""
        client = SafeClient()
        client.has_certificate = self._settings.nats_tls_cert is not None
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await self._connect(client)
        except (OSError, nats.errors.Error, TimeoutError) as exc:
            await _close(client)
            raise CannotConnect(
                f"cannot connect to NATS at {self._server}: {explain(exc, self._settings)}"
            ) from exc
        except ConfigError:
            await _close(client)
            raise
        except Exception as exc:  # noqa: BLE001 - of the client's libraries; its text may show a secret
            await _close(client)
            raise ConfigError(
                f"NATS_SERVER or a NATS_AUTH_ setting cannot be used ({type(exc).__name__})"
            ) from None
        except BaseException:
            await _close(client)
            raise
        return client

    async def _connect(self, client: SafeClient) -> None:
        """Log in, and subscribe the own subjects. Raises ConfigError for a server that is too old."""
        await client.connect(
            self._settings.nats_url,
            name=self._name,
            error_cb=partial(self._on_error, client),
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_closed,
            connect_timeout=max(1, round(self._settings.connect_timeout_s)),
            reconnect_time_wait=_RECONNECT_S,
            max_reconnect_attempts=-1,
            ping_interval=_PING_S,
            allow_reconnect=True,
            **login_options(self._settings),
        )
        client.has_connected = True
        version = client.connected_server_version
        if (version.major, version.minor) < _MINIMUM_VERSION:
            raise ConfigError(f"NATS at {self._server} is version {version}: upgrade it to 2.2 or later")
        for subject, callback in (
            (self._subject, self._on_message),
            (f"{self._subject}.*", self._on_status),
        ):
            await client.subscribe(
                subject, cb=callback, pending_msgs_limit=_NO_LIMIT, pending_bytes_limit=_NO_LIMIT
            )
        if self._describe is not None:
            await self._subscribe_questions(client, self._describe)
        await client.flush(max(1, round(self._settings.connect_timeout_s)))

    def send(self, receiver: str, connection_id: bytes, message: bytes) -> None:
        """See `Link.send`."""
        if self._is_up:
            self._waiting.append((receiver, f"{self._subject}.{connection_id.hex()}", message))
            self._is_drained.clear()
            self._wake.set()

    @property
    def is_behind(self) -> bool:
        """See `Link.is_behind`."""
        return len(self._waiting) >= BEHIND_COUNT

    async def announce(self, describe: Describe) -> None:
        """Answer PING, INFO and STATS as a NATS service does (ADR-32), so that tools made for these list this
        process. Raises CannotConnect."""
        assert self._client is not None
        self._describe = describe
        try:
            await self._subscribe_questions(self._client, describe)
        except nats.errors.Error as exc:
            raise CannotConnect(f"NATS at {self._server}: {explain(exc, self._settings)}") from exc

    async def _subscribe_questions(self, client: Client, describe: Describe) -> None:
        for question in ("ping", "info", "stats"):
            described = describe("ping")
            subject = f"$SRV.{question.upper()}"
            for asked in (
                subject,
                f"{subject}.{described['name']}",
                f"{subject}.{described['name']}.{described['id']}",
            ):
                await client.subscribe(asked, cb=partial(self._answer, describe, question))

    async def _answer(
        self, describe: Describe, question: Literal["ping", "info", "stats"], message: Msg
    ) -> None:
        """Answer a question about this process."""
        if message.reply and self._client is not None:
            described = describe(question)
            for endpoint in described.get("endpoints", ()):
                endpoint["subject"] = self._subject
            with suppress(OSError, nats.errors.Error):
                await self._client.publish(message.reply, json.dumps(described, default=repr).encode())

    async def _send_waiting(self) -> None:
        """Hand messages to the client; its own bound holds this task up while the server does not read."""
        assert self._client is not None
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                receiver, reply, message = self._waiting.popleft()
                try:
                    await self._client.publish(receiver, message, reply)
                except (OSError, nats.errors.Error, ValueError) as exc:
                    self._complaints.log("NATS at %s does not take a message: %s", self._server, exc)
                    self._lose(f"a message was not sent: {exc}")
            self._is_drained.set()

    # ------------------------------------------------------------------- callbacks of the client

    async def _on_message(self, message: Msg) -> None:
        sender = message.reply.rpartition(".")[0]
        # No message must have this process publish on another program's subjects.
        self._owner.on_message(message.data, sender if sender.startswith(self._space) else "")

    async def _on_status(self, message: Msg) -> None:
        if message.headers and message.headers.get("Status") == _NO_RESPONDERS:
            with suppress(ValueError):
                self._owner.on_unreachable(bytes.fromhex(message.subject.rpartition(".")[2]))

    async def _on_disconnected(self) -> None:
        if self._is_up:
            self._is_up = False
            self._lose(f"the connection to NATS at {self._server} was lost")
            _log.warning("the connection to NATS at %s is lost", self._server)

    async def _on_closed(self) -> None:
        """Replace a client that has given up: it does so when a server refuses it, even for a moment."""
        await self._on_disconnected()
        if self._client is None or self._is_closing:
            return
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.create_task(self._renew(), name=f"renewal of {self._subject}")

    async def _renew(self) -> None:
        """Connect a new client, however long it takes."""
        backoff = Backoff()
        while True:
            await asyncio.sleep(backoff.next_s())
            try:
                client = await self._new_client()
            except (CannotConnect, ConfigError) as exc:
                self._complaints.log("%s", exc)
                continue
            if not client.is_closed:
                self._client = client
                await self._on_reconnected()
                return

    async def _on_reconnected(self) -> None:
        self._is_up = True
        _log.info("connected to NATS at %s again", self._server)

    async def _on_error(self, client: SafeClient, error: Exception) -> None:
        if not client.has_connected:
            raise error  # else it would try for ever, and tell no reason
        if isinstance(error, nats.errors.SlowConsumerError):
            self._lose("this process did not read NATS messages in time")
        self._complaints.log("NATS at %s: %s", self._server, explain(error, self._settings))

    def _lose(self, reason: str) -> None:
        self._waiting.clear()
        self._owner.on_lost(reason)

    async def aclose(self) -> None:
        """See `Link.aclose`."""
        self._is_up = False
        self._is_closing = True
        if self._sender is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_S):
                    await self._is_drained.wait()
        tasks = [task for task in (self._sender, self._renewal) if task is not None]
        self._sender = self._renewal = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._client is not None:
            with suppress(OSError, nats.errors.Error, TimeoutError):
                await self._client.flush(1)
            await _close(self._client)
            self._client = None


async def _close(client: Client) -> None:
    with suppress(OSError, nats.errors.Error, TimeoutError, AssertionError):  # the last: it never began
        async with asyncio.timeout(_FLUSH_S):
            await client.close()
