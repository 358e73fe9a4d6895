"""The calling side of the http plane: each request becomes a POST to its instance.

A caller's stream of frames ends in this process, at a server of its own for each instance (`ForwardServer`),
whose handler makes the exchange. So requests wait, fail, stop and are flow-controlled by the same code as on
every plane, and only the way to the instance is HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final
from urllib.parse import quote

import msgpack

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import (
    AuthenticationFailed,
    CannotConnect,
    ConnectionLost,
    InvalidRequest,
    NotAccepted,
    Overloaded,
    PayloadTooLarge,
    PlaneError,
)
from dynamo_redis.names import format_instance_id
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context, Strength
from dynamo_redis.planes.frames.client import FrameClient
from dynamo_redis.planes.frames.client_connection import ClientConnection
from dynamo_redis.planes.frames.server import FrameServer
from dynamo_redis.planes.frames.server_request import RegisteredEndpoint
from dynamo_redis.planes.http import content
from dynamo_redis.planes.http.app import (
    DEADLINE_HEADER,
    EXCHANGE_HEADER,
    META_HEADER,
    NONCE_HEADER,
    PROOF_HEADER,
    REQUEST_ID_HEADER,
    STREAM_HEADER,
)
from dynamo_redis.planes.http.h2_client import Exchange, H2ClientConnection, Headers
from dynamo_redis.planes.http.local import LocalCarrier
from dynamo_redis.planes.http.token import make_proof, make_token
from dynamo_redis.planes.tcp.tls import TlsContext, dial_options, explain, make_tls
from dynamo_redis.wire.codec import pack

_TOKEN_S: Final = 300.0
_TOKEN_RENEWED_S: Final = 120.0
_STOP_S: Final = 3.0
_MAX_PROBLEM_BYTES: Final = 64 << 10
_PROBLEM_S: Final = 5.0


class HttpPeer:
    """The HTTP connections to one address."""

    def __init__(self, target: Target, settings: PlaneSettings, tls: TlsContext | None) -> None:
        self._target = target
        self._tls = tls
        self._settings = settings
        self._connections: list[H2ClientConnection] = []
        self._dialling: asyncio.Task[None] | None = None
        self._token = ""
        self._token_at = float("-inf")

    async def connect(self) -> H2ClientConnection:
        """Return a connection with room for an exchange, within the connect time-out. Those who wait share a
        dial and its error. Raises CannotConnect, and Overloaded if all connections are full."""
        timeout_s = self._settings.connect_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                while (connection := self._usable()) is None:
                    if self._dialling is None:
                        self._dialling = asyncio.create_task(self._dial())
                        self._dialling.add_done_callback(self._on_dialled)
                    await asyncio.shield(self._dialling)
        except TimeoutError:
            raise CannotConnect(f"no answer from {self._target.address} in {timeout_s} s") from None
        return connection

    def _usable(self) -> H2ClientConnection | None:
        return next((connection for connection in self._connections if connection.is_usable), None)

    def _on_dialled(self, dialling: asyncio.Task[None]) -> None:
        self._dialling = None
        if not dialling.cancelled():
            dialling.exception()  # retrieved: those who wait may have left

    async def _dial(self) -> None:
        """Add a connection to an instance that has proved itself. Raises PlaneError."""
        self._connections = [connection for connection in self._connections if not connection.has_ended]
        if len(self._connections) >= self._settings.pool_size:
            raise Overloaded(
                f"all {len(self._connections)} connections to {self._target.address} are full "
                "(DYN_TCP_POOL_SIZE, DYN_HTTP2_MAX_CONCURRENT_STREAMS)"
            )
        loop, address = asyncio.get_running_loop(), self._target.address
        connection: H2ClientConnection | None = None
        try:
            host, port, options = dial_options(address, self._tls)
            if options:
                options["ssl"].set_alpn_protocols(["h2"])
            scheme = "https" if options else "http"
            make = partial(H2ClientConnection, self._settings, address.partition("+")[0], scheme)
            async with asyncio.timeout(self._settings.connect_timeout_s):
                _, connection = await loop.create_connection(make, host, port, **options)
                await self.check(connection)
        except BaseException as exc:
            if connection is not None:
                connection.close()
            if isinstance(exc, TimeoutError):
                timeout_s = self._settings.connect_timeout_s
                raise CannotConnect(f"no answer from {address} in {timeout_s} s") from None
            if isinstance(exc, OSError | ValueError) and not isinstance(exc, PlaneError):
                raise CannotConnect(f"cannot connect to {address}: {explain(exc, address)}") from exc
            raise
        self._connections.append(connection)

    async def check(self, connection: H2ClientConnection) -> None:
        """Have the instance prove that it is the wanted one. Raises AuthenticationFailed, CannotConnect."""
        target, nonce = self._target, secrets.token_hex(16)
        headers = [*self.headers(), (NONCE_HEADER.decode(), nonce)]
        exchange = connection.begin(f"{self._settings.http_root_path}/-/probe", headers, b"")
        try:
            status = await exchange.wait_status()
            if status != 204:
                error = content.read_problem(status, await _read_problem(exchange))
                raise error if isinstance(error, AuthenticationFailed) else CannotConnect(str(error))
        finally:
            exchange.close()
        proof = make_proof(target.secret, target.instance_id, nonce)
        if not hmac.compare_digest(exchange.headers.get(PROOF_HEADER.decode(), ""), proof):
            raise AuthenticationFailed(
                f"the server at {target.address} does not know the secret of the instance"
            )

    @property
    def is_used(self) -> bool:
        """True while there is a connection, or a dial under way."""
        return bool(self._connections) or self._dialling is not None

    def close_idle(self) -> None:
        """Close connections that have been idle for long, and those past the limit of idle ones."""
        now, idle_count = asyncio.get_running_loop().time(), 0
        for connection in tuple(self._connections):
            if connection.has_ended:
                self._connections.remove(connection)
            elif not connection.exchange_count:
                idle_count += 1
                is_old = now - connection.idle_since > self._settings.http2_pool_idle_timeout_s
                if is_old or idle_count > self._settings.http2_pool_max_idle_count:
                    self._connections.remove(connection)
                    connection.close()

    def headers(self) -> Headers:
        """Return the headers that authenticate."""
        if self._target.secret is None:
            return []
        now = time.monotonic()
        if now - self._token_at > _TOKEN_RENEWED_S:
            self._token_at = now
            self._token = make_token(self._target.secret, self._target.instance_id, time.time() + _TOKEN_S)
        return [("authorization", f"Bearer {self._token}")]

    def close(self) -> None:
        """Close all connections."""
        if self._dialling is not None:
            self._dialling.cancel()
        for connection in self._connections:
            connection.close()
        self._connections.clear()


class ForwardServer(FrameServer):
    """This process's own end of the requests to one instance: its handler makes the exchanges."""

    def __init__(self, settings: PlaneSettings, target: Target, tls: TlsContext | None) -> None:
        unlimited = settings.model_copy(update={"max_in_flight_count": 1 << 30, "max_queued_count": 0})
        super().__init__(unlimited, secret=target.secret, instance_id=target.instance_id)
        self.peer = HttpPeer(target, settings, tls)
        self._own = f"{format_instance_id(target.instance_id)}/"
        self._stops: set[asyncio.Task[None]] = set()

    @property
    def plane(self) -> str:
        """`http`."""
        return "http"

    async def start(self) -> None:
        """See `FrameServer.start`."""
        self._use_running_loop()

    @property
    def is_used(self) -> bool:
        """True while a request, a connection or a dial needs it."""
        return bool(self._connections or self._stops or self.in_flight_count or self.peer.is_used)

    async def _stop_accepting(self) -> None:
        pass

    async def _release(self) -> None:
        self.peer.close()

    def endpoint(self, subject: str) -> RegisteredEndpoint:
        """Return an endpoint for any subject: the instance decides if it serves it."""
        endpoint = self._endpoints.get(subject)
        if endpoint is None:
            endpoint = self._endpoints[subject] = RegisteredEndpoint(
                subject, partial(self._forward, self._path(subject)), request_stream=True, cancel_grace_s=0.0
            )
        return endpoint

    def _path(self, subject: str) -> str:
        if subject.startswith(self._own):
            return f"{self._settings.http_root_path}/{subject.removeprefix(self._own)}"
        return f"{self._settings.http_root_path}/{quote(subject)}"

    async def _forward(self, path: str, messages: Any, context: Context) -> AsyncIterator[Any]:
        """Make the exchange of one request, and yield its items."""
        body = pack(await anext(messages))
        is_stream = not messages.is_over
        exchange_id = secrets.token_hex(8)
        headers = [
            ("content-type", content.MSGPACK),
            (EXCHANGE_HEADER.decode(), exchange_id),
            *self.peer.headers(),
            *_context_headers(context),
        ]
        if is_stream:
            headers.append((STREAM_HEADER.decode(), "1"))
        else:
            headers.append(("content-length", str(len(body))))
        connection = await self.peer.connect()
        exchange = connection.begin(path, headers, None if is_stream else body)
        sending: asyncio.Task[None] | None = None
        if is_stream:
            sending = asyncio.create_task(connection.send_body(exchange, _packed(body, messages)))
        elif not exchange.is_sent:
            sending = asyncio.create_task(connection.send_whole(exchange, body))
        unsubscribe = context.on_cancel(partial(self._on_cancel, exchange_id))
        try:
            await self._wait_accepted(exchange, None if is_stream else sending)
            async for item in self._items(exchange):
                yield item
        finally:
            unsubscribe()
            if is_stream and not exchange.has_ended:  # its unread messages may hide the end of the stream
                self._tell("kill", exchange_id)
            if sending is not None:
                sending.cancel()
            exchange.close()

    async def _items(self, exchange: Exchange) -> AsyncIterator[Any]:
        """Yield the items of an answer. Raises its error, and ConnectionLost if its end is missing."""
        status = await exchange.wait_status()
        if status != 200:
            raise content.read_problem(status, await _read_problem(exchange))
        limit_bytes = int(self._settings.max_message_bytes)
        unpacker = content.new_answer_unpacker(limit_bytes)
        try:
            while data := await exchange.read():
                unpacker.feed(data)
                for item in unpacker:
                    if item is content.BEAT:
                        continue
                    if type(item) is not content.End:
                        yield item
                    elif (error := content.read_end(item.content)) is not None:
                        raise error
                    else:
                        return
        except msgpack.BufferFull:
            raise PayloadTooLarge(size_bytes=None, limit_bytes=limit_bytes) from None
        except content.UNPACK_ERRORS as exc:
            if isinstance(exc, PlaneError):
                raise
            raise ConnectionLost(f"the answer is not MessagePack: {exc}") from exc
        raise ConnectionLost("the answer was cut off")

    async def _wait_accepted(self, exchange: Exchange, sending: asyncio.Task[None] | None) -> None:
        """Wait for the head of the answer, after the request has been sent. Raises NotAccepted."""
        if sending is not None:
            status = asyncio.ensure_future(exchange.wait_status())
            try:
                await asyncio.wait([sending, status], return_when=asyncio.FIRST_COMPLETED)
                if status.done():
                    status.result()
                    return
            finally:
                status.cancel()
            await asyncio.wait([status])
        timeout_s = self._settings.accept_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await exchange.wait_status()
        except TimeoutError:
            raise NotAccepted(f"the worker did not accept the request in {timeout_s} s") from None

    def _on_cancel(self, exchange_id: str, strength: Strength) -> None:
        if strength == "stop":
            self._tell(strength, exchange_id)

    def _tell(self, strength: Strength, exchange_id: str) -> None:
        """Tell the instance that the caller wants no more items."""
        task = asyncio.create_task(self._post_cancellation(strength, exchange_id))
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)

    async def _post_cancellation(self, strength: Strength, exchange_id: str) -> None:
        path = f"{self._settings.http_root_path}/-/{strength}/{exchange_id}"
        with suppress(PlaneError, TimeoutError):
            async with asyncio.timeout(_STOP_S):
                connection = await self.peer.connect()
                exchange = connection.begin(path, self.peer.headers(), b"")
                try:
                    await exchange.wait_status()
                finally:
                    exchange.close()

    async def probe(self, timeout_s: float) -> None:
        """Wait until the instance answers. Raises CannotConnect."""
        address = self.peer._target.address
        try:
            async with asyncio.timeout(timeout_s):
                await self.peer.check(await self.peer.connect())
        except Overloaded:
            return  # full of requests, whose connections are watched by PINGs: it is busy, not gone
        except TimeoutError:
            raise CannotConnect(f"no answer from {address} in {timeout_s} s") from None


class HttpCarrier:
    """Implements `Carrier`: to the own ends of the requests, once the instance can be reached."""

    def __init__(self, settings: PlaneSettings) -> None:
        """Raises ConfigError for TLS files that cannot be used."""
        self._settings = settings
        self._tls = make_tls(settings, "client")
        self._servers: dict[Target, ForwardServer] = {}
        self._sweep_timer: asyncio.TimerHandle | None = None

    async def server(self, target: Target) -> ForwardServer:
        """Return this process's own end of the requests to an instance."""
        key = Target(target.instance_id, target.address, "", target.secret)
        server = self._servers.get(key)
        if server is None:
            server = self._servers[key] = ForwardServer(self._settings, key, self._tls)
            await server.start()
            if self._sweep_timer is None:
                self._sweep_later()
        return server

    def _sweep_later(self) -> None:
        wait_s = max(1.0, self._settings.http2_pool_idle_timeout_s / 4)
        self._sweep_timer = asyncio.get_running_loop().call_later(wait_s, self._sweep)

    def _sweep(self) -> None:
        """Close idle connections, and forget the instances that nothing goes to any more."""
        self._sweep_timer = None
        for key, server in tuple(self._servers.items()):
            server.peer.close_idle()
            if not server.is_used:
                del self._servers[key]
        if self._servers:
            self._sweep_later()

    async def dial(
        self,
        target: Target,
        make: Callable[[], ClientConnection],
        on_made: Callable[[ClientConnection], None],
        give_up_at: float,
    ) -> ClientConnection:
        """See `Carrier.dial`."""
        server = await self.server(target)
        try:
            async with asyncio.timeout_at(give_up_at):
                await server.peer.connect()
        except TimeoutError:
            raise CannotConnect(f"no answer from {target.address} in time") from None
        return await LocalCarrier(server._new_connection).dial(target, make, on_made, give_up_at)

    async def ask_for_life(self, target: Target) -> bool:
        """See `Carrier.ask_for_life`."""
        return False

    async def aclose(self) -> None:
        """See `Carrier.aclose`."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        servers, self._servers = self._servers, {}
        for server in servers.values():
            await server.aclose()


class HttpClient(FrameClient):
    """Implements `RequestPlaneClient` over HTTP/2."""

    def __init__(self, settings: PlaneSettings, on_quiet: Callable[[Target], None] | None = None) -> None:
        """`on_quiet`: see `select.make_client`. Raises ConfigError for TLS files that cannot be used."""
        self._http = HttpCarrier(settings)
        super().__init__(settings, self._http, on_quiet)

    async def probe(self, target: Target, timeout_s: float) -> None:
        """See `RequestPlaneClient.probe`."""
        await (await self._http.server(target)).probe(timeout_s)


def _context_headers(context: Context) -> Headers:
    """Return the headers of a context. Raises InvalidRequest."""
    headers = [(REQUEST_ID_HEADER.decode(), quote(context.id(), safe=""))]
    remaining_s = context.remaining_s()
    if remaining_s is not None:
        headers.append((DEADLINE_HEADER.decode(), str(max(0, round(remaining_s * 1000)))))
    if context.traceparent is not None:
        if not (context.traceparent.isascii() and context.traceparent.isprintable()):
            raise InvalidRequest(f"the traceparent {context.traceparent!r} cannot be a header of HTTP")
        headers.append(("traceparent", context.traceparent))
    if context.given_metadata is not None:
        headers.append(
            (META_HEADER.decode(), base64.urlsafe_b64encode(pack(context.given_metadata)).decode())
        )
    return headers


async def _packed(first: bytes, messages: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    yield first
    async for message in messages:
        yield pack(message)


async def _read_problem(exchange: Exchange) -> bytes:
    """Read the body of an answer without items: what comes of it, since its status tells enough."""
    body = b""
    with suppress(ConnectionLost, TimeoutError):
        async with asyncio.timeout(_PROBLEM_S):
            while len(body) < _MAX_PROBLEM_BYTES and (part := await exchange.read()):
                body += part
    return body
