"""The calls of the KServe server, each of which may be a request of the application that serves HTTP.

| task | started by | ends |
|---|---|---|
| one for each call | grpcio | with the call; cancelled when the client cancels or the deadline passes |
| one for a request of a call (`_run`) | its call | with the answer; a cancelled call hangs up on it |

A request of a stream is read once the one before it is answered: HTTP/2's flow control holds the client back.
A write waits for a client that reads slowly, and the request plane's flow control then holds the worker back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, NoReturn, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from starlette.types import ASGIApp

from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.http.protocol import DRAIN_SEND_S
from dynamo_redis.frontend.kserve import inference_pb2 as pb
from dynamo_redis.frontend.kserve.apis import (
    CHECKED_CALLS,
    INFER,
    OPENING,
    SERVICE,
    STREAM_INFER,
    path_of,
)
from dynamo_redis.frontend.kserve.app_request import AppRequest, Call, read_message, time_left_s
from dynamo_redis.frontend.kserve.metadata import Metadata
from dynamo_redis.frontend.kserve.status import Refusal, refusal_of
from dynamo_redis.frontend.kserve.wire_size import id_in

log = logging.getLogger(__name__)

IDLE_STREAM_S: Final = 300.0
"""Longest time that a stream may be without a request: it takes a place among the calls."""

MOST_UNCHECKED_READS: Final = 4
"""Most messages that are received at a time for calls that need no key."""

UNCHECKED_READ_S: Final = 5.0
"""Longest time to receive such a message."""

DEADLINE_MARGIN_S: Final = 0.2
"""A call that is cancelled this close to its deadline was cancelled by it."""


class InferenceService:
    """Answers the calls of one server."""

    def __init__(self, app: ASGIApp, metadata: Metadata, send_timeout_s: float, *, most_open: int) -> None:
        """`app` serves a request by the path of its call. A client that reads nothing of a response for
        `send_timeout_s` has left. At most `most_open` calls may generate, or wait for it, at a time."""
        self._app = app
        self._most_open = most_open
        self._metadata = metadata
        self._send_timeout_s = send_timeout_s
        self._reading_unchecked = asyncio.Semaphore(MOST_UNCHECKED_READS)
        self._draining = asyncio.Event()
        self._open_count = 0
        self._idle = asyncio.Event()
        self._writing: set[asyncio.Timeout] = set()

    def drain(self) -> None:
        """Be no longer ready, end streams between their requests, and wait no longer for clients that do not
        read."""
        self._draining.set()
        self._send_timeout_s = min(self._send_timeout_s, DRAIN_SEND_S)
        at = asyncio.get_running_loop().time() + self._send_timeout_s
        for timeout in self._writing:
            timeout.reschedule(min(at, timeout.when() or at))

    async def until_idle(self) -> None:
        """Wait until no call that generates is open, but those of clients that do not read."""
        while self._open_count:
            self._idle.clear()
            await self._idle.wait()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the handlers of all calls.

        All are handlers of streams, also of calls with one message: grpcio receives the message of any other
        call, whole, before it hands over the call, also from a client without a key.
        """
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
            name: grpc.stream_stream_rpc_method_handler(
                self._answering(name, answer, request), response_serializer=response.SerializeToString
            )
            for name, (answer, request, response) in plain.items()
        }
        handlers["ModelInfer"] = grpc.stream_stream_rpc_method_handler(self._infer)
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream_infer)
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _server_ready(self, request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=not self._draining.is_set() and self._metadata.is_ready())

    def _answering(
        self, method: str, answer: Callable[[Any], Any], request: Any
    ) -> Callable[[Any, Call], Awaitable[None]]:
        """Return the handler of a call that needs no worker. The application only checks it, and logs it."""

        async def handle(_: Any, call: Call) -> None:
            if method in CHECKED_CALLS:
                refusal = await self._run(path_of(method), b"", call, _ignore)
                if refusal is not None:
                    await _abort(call, refusal)
            try:
                content = b""
                if request.DESCRIPTOR.fields:
                    async with self._reading_unchecked:
                        content = await read_message(call, UNCHECKED_READ_S)
                response = answer(request.FromString(content))
            except DecodeError:
                await _abort(call, Refusal(grpc.StatusCode.INVALID_ARGUMENT, "The message is broken."))
            except ApiError as exc:
                await _abort(call, refusal_of(f"{exc.status}\n{exc.code or ''}\n{exc.message}".encode()))
            await self._write(call, response)

        return handle

    # ----------------------------------------------------------------- inference

    async def _infer(self, _: Any, call: Call) -> None:
        """Serve ModelInfer. Its message is received once its key is checked."""
        messages: list[bytes] = []

        async def collect(message: bytes) -> bool:
            messages.append(message)
            return True

        with await self._open(call):
            refusal = await self._run(INFER.path, None, call, collect)
            if refusal is None:
                await self._write(call, b"".join(messages))
        if refusal is not None:
            await _abort(call, refusal)

    async def _stream_infer(self, _: Any, call: Call) -> None:
        """Serve ModelStreamInfer. A client that does not read is not waited for at the shutdown."""
        with await self._open(call):
            refusal = await self._run(path_of(OPENING), b"", call, _ignore)
            refusal = refusal or await self._answer_requests(call)
        if refusal is not None:
            await _abort(call, refusal)

    async def _answer_requests(self, call: Call) -> Refusal | None:
        """Answer one request of a stream after another, until the client ends its side. Return the error that
        the stream ends in.

        An error is a message of the stream, which goes on. With the metadata `triton_grpc_error: true` the
        first one ends it with its status.
        """
        ends_with_error = dict(call.invocation_metadata() or ()).get("triton_grpc_error") == "true"
        is_read = True

        async def write(message: bytes) -> bool:
            nonlocal is_read
            is_read = is_read and await self._write(call, message)
            return is_read

        while (content := await self._next_request(call)) is not None:
            if isinstance(content, Refusal):
                return content
            refusal = await self._run(STREAM_INFER.path, content, call, write)
            if refusal is not None and is_read:
                if ends_with_error:
                    return refusal
                message = pb.ModelStreamInferResponse(
                    error_message=f"{refusal.status.name}: {refusal.message}",
                    infer_response=pb.ModelInferResponse(id=id_in(memoryview(content))),
                )
                await write(message.SerializeToString())
            if not is_read:
                return Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "The client has read nothing for too long.")
        return None

    async def _next_request(self, call: Call) -> bytes | Refusal | None:
        """Return the next request of a stream; None at its end; a refusal at the shutdown, or if none comes
        for too long."""
        reading = asyncio.ensure_future(call.read())
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait(
                {reading, draining}, timeout=IDLE_STREAM_S, return_when=asyncio.FIRST_COMPLETED
            )
            if reading.done():
                content = reading.result()
                return None if content is grpc.aio.EOF else cast("bytes", content)
        finally:
            reading.cancel()
            draining.cancel()
        if not self._draining.is_set():
            text = f"No request has come for {IDLE_STREAM_S:g} s: open the stream again."
            return Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, text)
        return Refusal(grpc.StatusCode.UNAVAILABLE, "The frontend is shutting down: open the stream again.")

    async def _write(self, call: Call, message: Any) -> bool:
        """Write a message. Return False if the client has left, or reads nothing."""
        timeout = asyncio.timeout(self._send_timeout_s)
        try:
            async with timeout:
                self._writing.add(timeout)
                await call.write(message)
        except (TimeoutError, grpc.aio.UsageError, grpc.aio.InternalError, grpc.RpcError):
            return False
        finally:
            self._writing.discard(timeout)
        return True

    async def _run(
        self, path: str, content: bytes | None, call: Call, write: Callable[[bytes], Awaitable[bool]]
    ) -> Refusal | None:
        """Have the application answer a request, and write its messages. Return the error, if it ends in one.

        If the call is cancelled, the request ends as by a hang-up before this raises.
        """
        request = AppRequest(path, content, call, write)

        async def serve() -> None:
            await self._app(request.scope, request.receive, request.send)

        serving = asyncio.create_task(serve())
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            left_s = time_left_s(call)
            if left_s is not None and left_s < DEADLINE_MARGIN_S:  # the request ends by its own deadline
                await asyncio.wait({serving}, timeout=DEADLINE_MARGIN_S + max(0.0, left_s))
            request.gone.set()
            await asyncio.wait({serving})
            raise
        except Exception:
            log.exception("a request over gRPC failed")
        return request.refusal()

    async def _open(self, call: Call) -> contextlib.AbstractContextManager[None]:
        """Count a call as open within the block. Without a place for it, the call ends in an error."""
        if self._open_count >= self._most_open:
            text = f"{self._most_open} calls are open (DYN_HTTP_MAX_CONNECTIONS): try again later."
            await _abort(call, Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text))
        return self._counted()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._open_count += 1
        try:
            yield
        finally:
            self._open_count -= 1
            self._idle.set()


async def _ignore(_: bytes) -> bool:
    return True


async def _abort(call: Call, refusal: Refusal) -> NoReturn:
    """End a call with an error."""
    try:
        await call.abort(refusal.status, refusal.message, refusal.metadata)
    except grpc.aio.InternalError:  # the client has left, and gets none
        raise asyncio.CancelledError from None
