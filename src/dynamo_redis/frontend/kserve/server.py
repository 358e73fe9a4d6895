"""The gRPC server: health and metadata calls, and inference by the application that serves HTTP, too.

| task | started by | ends |
|---|---|---|
| `drain gRPC` | `serving_kserve` | once all calls have ended after the shutdown, or their time is over |
| one for each call | grpcio | with the call; cancelled when the client cancels or the deadline passes |
| one for a request of a call (`_run`) | its call | with the answer; a cancelled call hangs up on it |

A request of a stream is read once the one before it is answered: HTTP/2's flow control holds the client back.
A write waits for a client that reads slowly, and the request plane's flow control then holds the worker back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn, cast

import grpc
import grpc.aio
from starlette.types import ASGIApp

from dynamo_redis.config import FrontendSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.apis import Api
from dynamo_redis.frontend.completions import TIMEOUT_S
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.http.responses import Event
from dynamo_redis.frontend.kserve import inference_pb2 as pb
from dynamo_redis.frontend.kserve.apis import INFER, SERVICE, STREAM_INFER
from dynamo_redis.frontend.kserve.metadata import Metadata
from dynamo_redis.frontend.kserve.responses import messages_of
from dynamo_redis.frontend.kserve.status import Refusal, refusal_of
from dynamo_redis.frontend.kserve.wire_size import id_in

log = logging.getLogger(__name__)

Call = grpc.aio.ServicerContext[Any, Any]


class InferenceService:
    """Answers the calls of one server."""

    def __init__(self, app: ASGIApp, metadata: Metadata, send_timeout_s: float) -> None:
        """`app` serves a request by the path of its call. A client that reads nothing of a response for
        `send_timeout_s` has left."""
        self._app = app
        self._metadata = metadata
        self._send_timeout_s = send_timeout_s
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Be no longer ready, and end streams between their requests."""
        self._draining.set()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the handlers of all calls."""
        metadata = self._metadata
        plain: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
            "ServerLive": (metadata.server_live, pb.ServerLiveRequest, pb.ServerLiveResponse),
            "ServerReady": (self._server_ready, pb.ServerReadyRequest, pb.ServerReadyResponse),
            "ServerMetadata": (metadata.server, pb.ServerMetadataRequest, pb.ServerMetadataResponse),
            "ModelReady": (metadata.model_ready, pb.ModelReadyRequest, pb.ModelReadyResponse),
            "ModelMetadata": (metadata.model, pb.ModelMetadataRequest, pb.ModelMetadataResponse),
            "ModelConfig": (metadata.model_config, pb.ModelConfigRequest, pb.ModelConfigResponse),
        }
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                _answering(answer),
                request_deserializer=request.FromString,
                response_serializer=response.SerializeToString,
            )
            for name, (answer, request, response) in plain.items()
        }
        handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(self._infer)
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream_infer)
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _server_ready(self, request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=not self._draining.is_set() and self._metadata.is_ready())

    # ----------------------------------------------------------------- inference

    async def _infer(self, content: bytes, call: Call) -> bytes:
        """Serve ModelInfer."""
        messages: list[bytes] = []

        async def collect(message: bytes) -> None:
            messages.append(message)

        refusal = await self._run(INFER, content, call, collect)
        if refusal is not None:
            await _abort(call, refusal)
        return b"".join(messages)

    async def _stream_infer(self, _: Any, call: Call) -> None:
        """Serve ModelStreamInfer: answer one request after another, until the client ends its side.

        An error is a message of the stream, which goes on. With the metadata `triton_grpc_error: true` the
        first one ends it with its status.
        """
        ends_with_error = dict(call.invocation_metadata() or ()).get("triton_grpc_error") == "true"
        while (content := await self._next_request(call)) is not None:
            refusal = await self._run(STREAM_INFER, content, call, call.write)
            if refusal is None:
                continue
            if ends_with_error:
                await _abort(call, refusal)
            message = pb.ModelStreamInferResponse(
                error_message=f"{refusal.status.name}: {refusal.message}",
                infer_response=pb.ModelInferResponse(id=id_in(memoryview(content))),
            )
            await call.write(message.SerializeToString())

    async def _next_request(self, call: Call) -> bytes | None:
        """Return the next request of a stream; None if there is none."""
        reading = asyncio.ensure_future(call.read())
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({reading, draining}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                content = reading.result()
                return None if content is grpc.aio.EOF else cast("bytes", content)
        finally:
            reading.cancel()
            draining.cancel()
        return await _abort(
            call,
            Refusal(grpc.StatusCode.UNAVAILABLE, "The frontend is shutting down: open the stream again."),
        )

    async def _run(
        self, api: Api, content: bytes, call: Call, write: Callable[[bytes], Awaitable[None]]
    ) -> Refusal | None:
        """Have the application answer a request, and write its messages. Return the error, if it ends in one.

        If the call is cancelled, the request ends as by a hang-up before this raises.
        """
        request = _Request(api, content, call, write, self._send_timeout_s)

        async def serve() -> None:
            await self._app(request.scope, request.receive, request.send)

        serving = asyncio.create_task(serve())
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            left_s = _time_left_s(call)
            if left_s is not None and left_s < DEADLINE_MARGIN_S:  # the request ends by its own deadline
                await asyncio.wait({serving}, timeout=DEADLINE_MARGIN_S + max(0.0, left_s))
            request.gone.set()
            await asyncio.wait({serving})
            raise
        except Exception:
            log.exception("a request over gRPC failed")
        return request.refusal()


class _Request:
    """One request, between its call and the application: receives it once, and writes its response."""

    def __init__(
        self,
        api: Api,
        content: bytes,
        call: Call,
        write: Callable[[bytes], Awaitable[None]],
        send_timeout_s: float,
    ) -> None:
        self.scope = {
            "type": "grpc",
            "method": "POST",
            "path": api.path,
            "headers": _headers(call),
            TIMEOUT_S: _time_left_s(call),
        }
        self.gone = asyncio.Event()
        """Set once the client has left, or reads nothing."""
        self._content: bytes | None = content
        self._write = write
        self._send_timeout_s = send_timeout_s
        self._status: int | None = None
        self._headers: Sequence[tuple[bytes, bytes]] = ()
        self._error: bytes | None = None
        self._api = api

    async def receive(self) -> Event:
        """Return the request, then wait until the client has left."""
        if self._content is not None:
            content, self._content = self._content, None
            return {"type": "http.request", "body": content, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, event: Event) -> None:
        """Write the messages in a part of the response, or keep its error."""
        if event["type"] == "http.response.start":
            self._status, self._headers = event["status"], event["headers"]
            return
        body: bytes = event["body"]
        if self._status != 200:
            self._error = b"%d\n%b" % (self._status or 500, body)
        elif body and self._api is INFER:
            await self._write(body)
        elif body:
            await self._write_all(body)

    async def _write_all(self, frames: bytes) -> None:
        messages = messages_of(frames)
        for message in messages:
            if self.gone.is_set():
                return
            if not message:  # an error is behind it
                self._error = next(messages)
                return
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    await self._write(message)
            except TimeoutError:
                self._error = b"408\n\nThe client has read nothing for %d s." % self._send_timeout_s
                self.gone.set()
            except (grpc.aio.UsageError, grpc.aio.InternalError, grpc.RpcError):  # the call has ended
                self.gone.set()

    def refusal(self) -> Refusal | None:
        """Return the error that the request ended in, with the metadata that go with it."""
        if self._status is None and self._error is None:
            self._error = b"500\ninternal\nInternal error: there is no answer."
        if self._error is None:
            return None
        metadata = tuple(
            (str(name, "ascii"), str(value, "latin-1"))
            for name, value in self._headers
            if name in (b"x-request-id", b"retry-after")
        )
        return refusal_of(self._error, metadata)


def _headers(call: Call) -> list[tuple[bytes, bytes]]:
    """Return the metadata of a call as the headers of a request. Names and texts in them are ASCII."""
    return [
        (name.encode(), value if isinstance(value, bytes) else value.encode())
        for name, value in call.invocation_metadata() or ()
    ]


def _time_left_s(call: Call) -> float | None:
    """Return the time to the deadline of a call; None if it has none."""
    return call.time_remaining()


async def _abort(call: Call, refusal: Refusal) -> NoReturn:
    """End a call with an error."""
    await call.abort(refusal.status, refusal.message, refusal.metadata)


def _answering(answer: Callable[[Any], Any]) -> Callable[[Any, Call], Awaitable[Any]]:
    """Return the handler of a call that needs no worker."""

    async def handle(request: Any, call: Call) -> Any:
        try:
            return answer(request)
        except ApiError as exc:
            await _abort(call, refusal_of(f"{exc.status}\n{exc.code or ''}\n{exc.message}".encode()))

    return handle


# --------------------------------------------------------------------------- lifetime

DEADLINE_MARGIN_S: Final = 0.2
"""A call that is cancelled this close to its deadline was cancelled by it."""

KEEP_ALIVE_S: Final = 60.0
"""A client that has gone without a word is noticed by a ping after this time."""

PING_TIMEOUT_S: Final = 20.0


@contextlib.asynccontextmanager
async def serving_kserve(
    app: ASGIApp,
    metadata: Metadata,
    settings: FrontendSettings,
    wait_for_shutdown: Callable[[], Awaitable[None]],
    drain_s: float,
) -> AsyncIterator[int]:
    """Serve until the shutdown; yield the port. At the end of the block calls under way have ended.

    They have `drain_s` from the shutdown. If the block ends by an error, they are cancelled.
    Raises ConfigError if the port cannot be had.
    """
    service = InferenceService(app, metadata, settings.send_timeout_s)
    server = grpc.aio.server(
        handlers=[service.handlers()],
        maximum_concurrent_rpcs=settings.max_http_connections_count,
        options=[
            ("grpc.so_reuseport", int(settings.frontend_processes_count > 1)),
            ("grpc.max_receive_message_length", int(settings.max_body_bytes)),
            ("grpc.max_send_message_length", -1),
            ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a few bytes could be many
            ("grpc.keepalive_time_ms", int(KEEP_ALIVE_S * 1000)),
            ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT_S * 1000)),
        ],
    )
    address = f"{_bracketed(settings.http_host)}:{settings.grpc_port}"
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as exc:
        raise ConfigError(
            f"cannot listen for gRPC on {address}: stop the program that has this port, or choose another "
            "with --grpc-port (DYN_GRPC_PORT); 0 takes a free one"
        ) from exc
    await server.start()
    log.info("KServe over gRPC on %s:%d", _bracketed(settings.http_host), port)

    async def drain() -> None:
        await wait_for_shutdown()
        service.drain()
        await server.stop(drain_s)

    draining = asyncio.create_task(drain(), name="drain gRPC")
    try:
        yield port
        await draining
    finally:
        draining.cancel()
        await server.stop(None)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
