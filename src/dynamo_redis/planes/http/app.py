"""The ASGI application of the http plane: each POST is a request to an endpoint of this process.

    POST {root}/{namespace}/{component}/{endpoint}      a request; the answer streams
    POST {root}/-/stop/{exchange}                       stop a request that has this id
    POST {root}/-/kill/{exchange}                       kill it
    POST {root}/-/probe                                 204, with the proof of the instance that answers
    GET  {root}/-/live                                  204, for health checks of proxies

Requests run behind the same admission, deadlines and flow control as on every plane: each HTTP connection has
a session of frames to this process's own server, without a socket (`tunnel/pair.py`).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from typing import Any, Final, TypeVar, cast
from urllib.parse import unquote

import msgpack

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import (
    AuthenticationFailed,
    ConnectionLost,
    DeadlineExceeded,
    EndpointNotFound,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    PlaneError,
)
from dynamo_redis.names import format_instance_id
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames.client import FrameClient
from dynamo_redis.planes.frames.response_stream import FrameResponseStream
from dynamo_redis.planes.http import content
from dynamo_redis.planes.http.reply import Receive, Receiver, Refused, Reply, Send
from dynamo_redis.planes.http.token import check_token, make_proof
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.wire.codec import pack, unpack

ACCEPT_AFTER_S: Final = 0.5
"""Time without an item after which the head of the answer tells that the request is accepted."""

MAX_IDLE_SESSIONS: Final = 256
"""The most sessions of HTTP connections without requests."""

T = TypeVar("T")

BODY_IDLE_S: Final = 60.0
"""Longest time between two parts of a request's body, and before the first message of a request stream. Its
later messages may be further apart."""

DEADLINE_HEADER: Final = b"x-request-timeout-ms"
REQUEST_ID_HEADER: Final = b"x-request-id"
EXCHANGE_HEADER: Final = b"x-dynamo-exchange"
META_HEADER: Final = b"x-dynamo-meta"
STREAM_HEADER: Final = b"x-dynamo-request-stream"
INSTANCE_HEADER: Final = b"x-dynamo-instance"
NONCE_HEADER: Final = b"x-dynamo-nonce"
PROOF_HEADER: Final = b"x-dynamo-proof"

BEAT_S: Final = 1.0
"""Longest silence of an answer over HTTP/1."""

MAX_FIELD_COUNT: Final = 100

_VERSIONS: Final = ("1.1", "2")
_MAX_DEADLINE_DIGITS: Final = 15
_AHEAD_COUNT: Final = 16
_CLOSE_S: Final = 2.0
_WATCH_AFTER_S: Final = 0.05

Scope = MutableMapping[str, Any]


class HttpApp:
    """Serves the plane's paths. `target` is this process's own server, by its local client."""

    def __init__(
        self,
        settings: PlaneSettings,
        client: FrameClient,
        secret: bytes | None,
        instance_id: int,
        is_served: Callable[[str], bool],
        complaints: RateLimitedLog,
    ) -> None:
        """`is_served` tells if this process has an endpoint of that subject."""
        self._settings = settings
        self._root = settings.http_root_path
        self._client = client
        self._secret = secret
        self._instance_id = instance_id
        self._instance = format_instance_id(instance_id)
        self._is_served = is_served
        self._complaints = complaints
        self.asked: set[str] = set()
        """The addresses of the connections that have sent a request. The HTTP server forgets those that have
        ended."""
        self._calls: set[asyncio.Task[None]] = set()
        self._contexts: dict[str, Context] = {}
        self._receiving_bytes = 0
        self._under_way: dict[str, set[Context]] = {}  # by the address of the connection
        self._idle: dict[str, Target] = {}  # the oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        version = scope["http_version"]
        bodies = Receiver(receive)
        reply = Reply(send, bodies, None if version == "2" else BEAT_S)
        self.asked.add(_client_of(scope))
        call = cast("asyncio.Task[None]", asyncio.current_task())
        self._calls.add(call)
        try:
            if version not in _VERSIONS:
                raise Refused(505, "this plane speaks HTTP/1.1 and HTTP/2")
            if len(scope["headers"]) > MAX_FIELD_COUNT:
                raise Refused(431, f"a request has at most {MAX_FIELD_COUNT} header fields")
            await self._answer(scope, bodies, reply)
        except (PlaneError, Refused) as exc:
            if isinstance(exc, AuthenticationFailed):
                self._complaints.log("%s does not get in: %s", _client_of(scope), exc)
            await (reply.refuse(exc) if isinstance(exc, Refused) else reply.fail(exc))
        except asyncio.CancelledError:
            return  # granian would log it as a failure
        finally:
            self._calls.discard(call)

    async def aclose(self) -> None:
        """End what is left of the requests, once their connections have ended."""
        for call in self._calls:
            call.cancel()
        if self._calls:
            await asyncio.wait(self._calls, timeout=_CLOSE_S)

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        path: str = scope["path"]
        if not path.startswith(f"{self._root}/"):
            raise EndpointNotFound(
                f"{path} is not below {self._root}: POST {self._root}/NAMESPACE/COMPONENT/ENDPOINT"
            )
        raw = (scope.get("raw_path") or path.encode()).decode("ascii", "replace").partition("?")[0]
        rest = raw[len(self._root) + 1 :] if raw.startswith(f"{self._root}/") else path[len(self._root) + 1 :]
        headers: dict[bytes, bytes] = dict(scope["headers"])
        method = scope["method"]
        if rest == "-/live":
            await reply.empty(204, [])
            return
        if b"origin" in headers:  # of a web page; a form could send what is read as JSON
            raise Refused(403, "web pages may not call this plane")
        self._authorize(headers)
        if rest == "-/probe":
            nonce = headers.get(NONCE_HEADER, b"").decode("latin-1")
            proof = make_proof(self._secret, self._instance_id, nonce)
            await reply.empty(
                204, [(INSTANCE_HEADER, self._instance.encode()), (PROOF_HEADER, proof.encode())]
            )
            return
        if method != "POST":
            raise Refused(405, "only POST is served here", [(b"allow", b"POST")])
        if rest.startswith(("-/stop/", "-/kill/")):
            _, action, exchange = rest.split("/", 2)
            context = self._contexts.get(exchange)
            if context is not None:
                (context.kill if action == "kill" else context.stop_generating)()
            await reply.empty(204, [])
            return
        await self._serve(self._subject(rest), scope, headers, receive, reply)

    def _authorize(self, headers: dict[bytes, bytes]) -> None:
        """Raise AuthenticationFailed for a request without a valid token."""
        if self._secret is None:
            return
        kind, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise AuthenticationFailed(
                "send `Authorization: Bearer TOKEN`; `dynamo-redis token INSTANCE` makes a token"
            )
        check_token(token.strip(), self._secret, self._instance_id, time.time())

    def _subject(self, path: str) -> str:
        own = f"{self._instance}/{path}"
        if self._is_served(own):
            return own
        plain = unquote(path)
        return plain if self._is_served(plain) else own

    # ------------------------------------------------------------------- one request

    async def _serve(
        self, subject: str, scope: Scope, headers: dict[bytes, bytes], receive: Receive, reply: Reply
    ) -> None:
        is_msgpack = content.is_msgpack(headers.get(b"content-type", b"").decode("latin-1"))
        if is_msgpack is None:
            raise Refused(415, f"write the request as {content.JSON} or {content.MSGPACK}")
        context = _context_of(headers)
        body = _Body(self, receive, headers, self._settings)
        exchange = headers.get(EXCHANGE_HEADER, b"").decode("latin-1")
        messages: AsyncIterator[Any] | None = None
        reading: asyncio.Task[None] | None = None
        if exchange:
            self._contexts[exchange] = context
        try:
            if STREAM_HEADER in headers and is_msgpack:
                reading = asyncio.create_task(body.read_ahead(context))
                messages = body.messages()
            request = await _read_request(body, messages, context, is_msgpack=is_msgpack)
            target = Target(self._instance_id, _client_of(scope), subject, self._secret)
            stream = self._begin(target, request, context, messages)
            self._note_begun(target, context)
            if reading is None:
                reading = asyncio.create_task(body.wait_for_disconnect(context, _WATCH_AFTER_S))
            try:
                await _send_answer(stream, reply, is_msgpack=is_msgpack)
            finally:
                await stream.aclose()
                self._note_over(target, context)
        finally:
            if reading is not None:
                reading.cancel()
            self._contexts.pop(exchange, None)
            body.release()

    def _begin(
        self, target: Target, request: Any, context: Context, messages: AsyncIterator[Any] | None
    ) -> FrameResponseStream:
        try:
            return self._client.open(target, request, context, messages=messages)
        except TypeError as exc:  # JSON may nest deeper than a frame
            raise InvalidRequest(str(exc)) from exc

    @property
    def is_busy(self) -> bool:
        """True while answers are being written."""
        return bool(self._under_way)

    def addresses(self) -> set[str]:
        """Return the addresses of the connections with requests under way."""
        return set(self._under_way)

    def kill(self, addresses: set[str]) -> None:
        """Kill the requests of connections that have ended."""
        for address in addresses:
            for context in tuple(self._under_way.get(address, ())):
                context.kill()

    def _note_begun(self, target: Target, context: Context) -> None:
        self._idle.pop(target.address, None)
        self._under_way.setdefault(target.address, set()).add(context)

    def _note_over(self, target: Target, context: Context) -> None:
        """Keep the session of an HTTP connection without requests, but not of any number of them: a caller
        may use a new connection for each request."""
        contexts = self._under_way[target.address]
        contexts.discard(context)
        if contexts:
            return
        del self._under_way[target.address]
        self._idle[target.address] = target
        if len(self._idle) > MAX_IDLE_SESSIONS:
            self._client.forget(self._idle.pop(next(iter(self._idle))))

    def reserve(self, size_bytes: int) -> None:
        """Count bytes of a body that is being received. Raises Overloaded past the plane's budget."""
        if self._receiving_bytes + size_bytes > self._settings.max_payload_in_flight_bytes:
            raise Overloaded("the worker holds as many bytes of large requests as it may")
        self._receiving_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Count bytes of a body as freed."""
        self._receiving_bytes -= size_bytes


class _Body:
    """The body of a request, as ASGI delivers it."""

    def __init__(
        self, app: HttpApp, receive: Receive, headers: dict[bytes, bytes], settings: PlaneSettings
    ) -> None:
        self._app = app
        self._receive = receive
        self._limit_bytes = int(settings.max_message_bytes)
        self._announced = headers.get(b"content-length", b"")
        self._held_bytes = 0
        self._is_over = False
        self._ahead: asyncio.Queue[bytes | ConnectionLost | None] = asyncio.Queue(_AHEAD_COUNT)

    async def _next(self) -> bytes | None:
        """Return the next part; None at the end. Raises ConnectionLost if the caller has left."""
        if self._is_over:
            return None
        message = await self._receive()
        if message["type"] != "http.request":
            raise ConnectionLost("the caller has left")
        self._is_over = not message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part

    async def read(self) -> bytes:
        """Return the whole body. Raises PayloadTooLarge, Overloaded and ConnectionLost."""
        if self._announced.isdigit() and int(self._announced) > self._limit_bytes:
            raise PayloadTooLarge(size_bytes=int(self._announced), limit_bytes=self._limit_bytes)
        parts: list[bytes] = []
        while (part := await _in_time(self._next())) is not None:
            self._hold(self._held_bytes + len(part))
            parts.append(part)
            if self._announced == b"%d" % self._held_bytes:  # whole: its end costs a further turn
                break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _hold(self, size_bytes: int) -> None:
        """Count the bytes that are held now. Raises PayloadTooLarge and Overloaded."""
        if size_bytes > self._limit_bytes:
            raise PayloadTooLarge(size_bytes=None, limit_bytes=self._limit_bytes)
        self._app.reserve(size_bytes - self._held_bytes)
        self._held_bytes = size_bytes

    async def read_ahead(self, context: Context) -> None:
        """Take in the parts of a request stream, so that the end of its caller is seen, and kill the request
        then. What it holds is bounded: past that, the caller waits."""
        try:
            while (part := await self._next()) is not None:
                await self._ahead.put(part)
            await self._ahead.put(None)
            await self.wait_for_disconnect(context)
        except ConnectionLost as exc:
            context.kill()
            with suppress(asyncio.QueueFull):  # then no reader waits
                self._ahead.put_nowait(exc)

    async def messages(self) -> AsyncIterator[Any]:
        """Yield the MessagePack values of the body as they come. Raises InvalidRequest, PayloadTooLarge and
        Overloaded."""
        unpacker = msgpack.Unpacker(max_buffer_size=self._limit_bytes, strict_map_key=False, timestamp=1)
        received_bytes = taken_bytes = 0
        while (part := await self._ahead.get()) is not None:
            if isinstance(part, ConnectionLost):
                raise part
            received_bytes += len(part)
            try:
                unpacker.feed(part)
                for value in unpacker:
                    taken_bytes = unpacker.tell()
                    yield value
            except msgpack.BufferFull:
                raise PayloadTooLarge(size_bytes=None, limit_bytes=self._limit_bytes) from None
            except content.UNPACK_ERRORS as exc:
                raise InvalidRequest(f"a message is not MessagePack: {exc!r}") from exc
            self._hold(received_bytes - taken_bytes)
        if self._held_bytes:
            raise InvalidRequest("the body ends inside a message")

    async def wait_for_disconnect(self, context: Context, after_s: float = 0.0) -> None:
        """Kill the request once its caller has left. Look from `after_s` on: most answers take less, and a
        look costs as much as a small answer."""
        await asyncio.sleep(after_s)
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                context.kill()
                return

    def release(self) -> None:
        """Free the body's share of the budget. Idempotent."""
        self._app.release(self._held_bytes)
        self._held_bytes = 0


async def _in_time(part: Awaitable[T]) -> T:
    """Wait for a part of a body. Raises InvalidRequest if it does not come.

    A generator as context manager would tie the exception and its own frame to each other. They would hold
    the request, and so its connection, until the garbage collector runs.
    """
    limit = asyncio.timeout(BODY_IDLE_S)
    try:
        async with limit:
            return await part
    except TimeoutError:
        if not limit.expired():
            raise
        raise InvalidRequest(f"nothing of the body came for {BODY_IDLE_S:g} s") from None


async def _read_request(
    body: _Body, messages: AsyncIterator[Any] | None, context: Context, *, is_msgpack: bool
) -> Any:
    """Return the request: the first of the messages, or the whole body. Raises PlaneError: DeadlineExceeded
    if it has not come before the request's deadline."""
    limit = asyncio.timeout(context.remaining_s())
    try:
        async with limit:
            if messages is not None:
                return await _in_time(anext(messages, None))
            data = await body.read()
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded("the request's deadline passed before it had come") from None
    return content.read_msgpack(data) if is_msgpack else content.read_json(data)


async def _send_answer(stream: FrameResponseStream, reply: Reply, *, is_msgpack: bool) -> None:
    """Send the items as they come, and the end. Raises PlaneError before the first item."""
    encode = _encode_msgpack if is_msgpack else content.json_lines
    content_type = content.MSGPACK if is_msgpack else content.JSON_LINES
    try:
        try:
            async with asyncio.timeout(ACCEPT_AFTER_S):
                items = await stream.next_items()
        except TimeoutError:
            await reply.body(content_type, b"")  # a head alone would wait for the first item
            items = await _next_items(stream, reply, content_type)
        while items:
            data = _encoded(items, encode)
            if stream.is_over:
                await reply.finish(content_type, data + (content.msgpack_end() if is_msgpack else b""))
                return
            await reply.body(content_type, data)
            items = await _next_items(stream, reply, content_type)
        await reply.finish(content_type, content.msgpack_end() if is_msgpack else b"")
    except PlaneError as exc:
        if not reply.has_started:
            raise
        end = (
            content.msgpack_end(exc) if is_msgpack else content.json_lines([{"error": content.problem(exc)}])
        )
        await reply.finish(content_type, end)


async def _next_items(stream: FrameResponseStream, reply: Reply, content_type: str) -> list[Any]:
    """Wait for items. On HTTP/1 only a write shows that the caller has left, so a beat is sent meanwhile."""
    if reply.beat_s is None:
        return await stream.next_items()
    while True:
        try:
            async with asyncio.timeout(reply.beat_s):
                return await stream.next_items()
        except TimeoutError:
            await reply.body(content_type, content.MSGPACK_BEAT if content_type == content.MSGPACK else b"\n")


def _encode_msgpack(items: Iterable[Any]) -> bytes:
    return b"".join(map(pack, items))


def _encoded(items: list[Any], encode: Callable[[list[Any]], bytes]) -> bytes:
    try:
        return encode(items)
    except (TypeError, ValueError) as exc:
        raise InvalidRequest(f"an item cannot be written in this content type: {exc}") from exc


def _context_of(headers: dict[bytes, bytes]) -> Context:
    """Make the request's context. Raises InvalidRequest."""
    deadline = None
    timeout = headers.get(DEADLINE_HEADER)
    if timeout is not None:
        if not timeout.isdigit() or len(timeout) > _MAX_DEADLINE_DIGITS:
            raise InvalidRequest(f"{DEADLINE_HEADER.decode()} is a number of milliseconds")
        deadline = time.monotonic() + int(timeout) / 1000
    metadata: Any = None
    if META_HEADER in headers:
        try:
            metadata = unpack(base64.urlsafe_b64decode(headers[META_HEADER]))
            if metadata is not None and not isinstance(metadata, dict):
                raise ValueError("no map")
        except (ValueError, binascii.Error) as exc:
            raise InvalidRequest(f"{META_HEADER.decode()} is malformed: {exc}") from exc
    request_id = headers.get(REQUEST_ID_HEADER)
    traceparent = headers.get(b"traceparent")
    try:
        return Context(
            None if request_id is None else unquote(request_id.decode("latin-1")),
            metadata,
            deadline=deadline,
            traceparent=None if traceparent is None else traceparent.decode("latin-1"),
        )
    except TypeError as exc:
        raise InvalidRequest(str(exc)) from exc


def _client_of(scope: Scope) -> str:
    host, port = scope["client"]
    return f"{host}:{port}"
