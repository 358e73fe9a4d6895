"""One request and its answer: from workers' items to HTTP, whole or as server-sent events.

Of each request these tasks exist, all ended before the response is: the server's own, which writes; one
that waits for the client to hang up, and then kills the request at its workers; and one a choice, which
reads a worker's items. Readers and writer share one list of encoded events: it is written in one piece
whenever the writer gets its turn, so all events of one tick share a write, and it is bounded: past
`BUFFER_BYTES` readers wait, the plane's flow control holds the worker back, and a slow client costs no more.

Writing happens in the server's task alone, never where a worker's connection delivers its frames: a client
that is gone disturbs nobody else's stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from dynamo_redis.errors import DynamoRedisError, EngineFailed, ProtocolViolation
from dynamo_redis.frontend.answers import Answer
from dynamo_redis.frontend.http.errors import ApiError, worker_error, worker_lost
from dynamo_redis.frontend.http.sse import DONE, ChunkEncoder, Kind, event
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.planes.context import Context

log = logging.getLogger(__name__)

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

BUFFER_BYTES = 64 * 1024

_WHOLE_TRIES = 3
"""So many workers may begin one answer that no client sees before it is whole."""

_END_GRACE_S = 1.0
"""How long a worker may take from the item with the finish reason to the end of its answer."""

Generate = Callable[[GenerateRequest, Context], Awaitable[AsyncIterator[Any]]]
"""Sends a request to a worker; awaited, and then iterated. Raises PlaneError at either step."""


class Choice:
    """One choice of a completion: what is asked for, and what has come."""

    __slots__ = ("answer", "begun", "context", "index", "pieces", "request")

    def __init__(self, index: int, request: GenerateRequest, answer: Answer, context: Context) -> None:
        self.index = index
        self.request = request
        self.answer = answer
        self.context = context
        self.begun = False
        """Whether part of the answer has come."""
        self.pieces: list[str] = []

    def restart(self) -> None:
        """Forget what has come: another worker answers from the beginning."""
        self.begun = False
        self.pieces.clear()
        self.answer.restart()


class Exchange:
    """Runs the choices of one completion and writes the response."""

    def __init__(
        self,
        kind: Kind,
        frame: dict[str, Any],
        choices: Sequence[Choice],
        generate: Generate,
    ) -> None:
        """`frame` holds what every chunk and the whole response have: id, created, model."""
        self._kind: Kind = kind
        self._frame = frame
        self._choices = choices
        self._generate = generate
        self._events: list[bytes] = []
        self._buffered = 0
        self._open = len(choices)
        self._error: ApiError | None = None
        self._hung_up = False
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._encoders: list[ChunkEncoder] = []

    # ----------------------------------------------------------------- whole

    async def respond(self, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer with one JSON object, or with an error. Returns early if the client hangs up.

        A choice whose worker is lost half-way is asked of another one from the beginning.
        """
        await self._run(receive, self._collect, self._wait_for_end, tries=_WHOLE_TRIES)
        if self._hung_up:
            return
        if self._error is not None:
            await send_error(send, self._error, headers)
            return
        content = json.dumps(self._whole(), ensure_ascii=False).encode(errors="replace")
        await send_json(send, 200, content, headers)

    async def _collect(self, choice: Choice, text: str) -> None:
        choice.pieces.append(text)

    async def _wait_for_end(self) -> None:
        while self._open and self._error is None and not self._hung_up:
            self._wake.clear()
            await self._wake.wait()

    def _whole(self) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for choice in self._choices:
            text = "".join(choice.pieces)
            content: dict[str, Any] = {"text": text}
            if self._kind == "chat":
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(
                {
                    "index": choice.index,
                    **content,
                    "logprobs": None,
                    "finish_reason": choice.answer.finish_reason,
                }
            )
        kind = "chat.completion" if self._kind == "chat" else "text_completion"
        return {**_ordered(self._frame, kind), "choices": choices, "usage": self._usage()}

    # ----------------------------------------------------------------- streamed

    async def stream(
        self, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]], *, includes_usage: bool
    ) -> None:
        """Answer with server-sent events. An error before the first item is answered as a JSON error, a
        later one as an event after which the stream ends. Returns early if the client hangs up."""
        kind = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        frame = _ordered(self._frame, kind)
        self._encoders = [
            ChunkEncoder(self._kind, frame, choice.index, includes_usage=includes_usage)
            for choice in self._choices
        ]

        async def write() -> None:
            await self._write(send, headers, frame if includes_usage else None)

        await self._run(receive, self._encode, write, tries=1)

    async def _encode(self, choice: Choice, text: str) -> None:
        encoder = self._encoders[choice.index]
        answer = choice.answer
        piece = encoder.delta(text) if text or answer.finish_reason is None else b""
        if not choice.pieces:
            piece = encoder.begin() + piece
            choice.pieces.append("")
        if answer.finish_reason is not None:
            piece += encoder.end(answer.finish_reason)
        self._events.append(piece)
        self._buffered += len(piece)
        self._wake.set()
        while self._buffered > BUFFER_BYTES:
            self._room.clear()
            await self._room.wait()

    async def _write(
        self, send: Send, headers: list[tuple[bytes, bytes]], usage_frame: dict[str, Any] | None
    ) -> None:
        started = False
        while not self._hung_up:
            if not self._events and self._open and self._error is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            if not started and self._error is not None and not self._events:
                await send_error(send, self._error, headers)
                return
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": [*_SSE, *headers]})
            ended = not self._open or self._error is not None
            if ended:
                self._events.append(self._last(usage_frame))
            content = b"".join(self._events)
            self._events.clear()
            self._buffered = 0
            self._room.set()
            await send({"type": "http.response.body", "body": content, "more_body": not ended})
            if ended:
                return

    def _last(self, usage_frame: dict[str, Any] | None) -> bytes:
        """The events that end a stream."""
        if self._error is not None:
            return event(self._error.body())
        if usage_frame is None:
            return DONE
        return event({**usage_frame, "choices": [], "usage": self._usage()}) + DONE

    # ----------------------------------------------------------------- both

    async def _run(
        self,
        receive: Receive,
        deliver: Callable[[Choice, str], Awaitable[None]],
        respond: Callable[[], Awaitable[None]],
        *,
        tries: int,
    ) -> None:
        """Read all choices while `respond` runs, and end every task when it returns or is cancelled."""
        tasks = [asyncio.create_task(self._read(choice, deliver, tries)) for choice in self._choices]
        tasks.append(asyncio.create_task(self._wait_for_hang_up(receive)))
        try:
            await respond()
        finally:
            for task in tasks:
                task.cancel()
            for choice in self._choices:
                choice.context.kill()  # no effect on one that has ended
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(
        self, choice: Choice, deliver: Callable[[Choice, str], Awaitable[None]], tries: int
    ) -> None:
        """Read an answer to its end; from its beginning again, at most `tries` times, if it breaks off."""
        complete = False
        try:
            while not complete:
                tries -= 1
                complete = await self._read_once(choice, deliver, is_last=tries <= 0)
        except Exception as exc:
            if not isinstance(exc, (DynamoRedisError, ApiError)):
                log.exception("request %s failed", choice.context.id())
            elif worker_lost(exc) or isinstance(exc, (EngineFailed, ProtocolViolation)):
                _losses.report(choice.context.id(), exc)
            if self._error is None:
                self._error = worker_error(exc, self._frame["model"], begun=choice.begun)
        finally:
            if not complete and self._error is None:  # no way out of here makes a part look like the whole
                self._error = ApiError(
                    500,
                    "The answer is incomplete: send the request again.",
                    kind="server_error",
                    code="internal",
                )
            self._open -= 1
            self._wake.set()

    async def _read_once(
        self, choice: Choice, deliver: Callable[[Choice, str], Awaitable[None]], *, is_last: bool
    ) -> bool:
        """Read an answer to its end, or, unless this is the last try, to where its worker was lost: False."""
        answer = choice.answer
        items: Any = None
        try:
            items = await self._generate(choice.request, choice.context)
            async for item in items:
                choice.begun = True
                await deliver(choice, answer.feed(item))
                if answer.finish_reason is not None:
                    break
            answer.check_complete()
            if not answer.cut_off:
                await _read_to_end(items)
        except DynamoRedisError as exc:
            lost = worker_lost(exc) or isinstance(exc, EngineFailed)
            if is_last or not lost or not choice.begun or choice.context.is_stopped():
                raise
            _losses.report(choice.context.id(), exc)
            choice.restart()
            return False
        finally:
            if items is not None:
                await items.aclose()
        return True

    async def _wait_for_hang_up(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._hung_up = True
        for choice in self._choices:
            choice.context.kill()
        self._wake.set()

    def _usage(self) -> dict[str, Any]:
        completion = sum(choice.answer.token_count for choice in self._choices)
        prompts = self._prompt_counts()
        prompt = sum(count for count, _ in prompts)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        cached = [count for _, count in prompts if count is not None]
        if cached:
            usage["prompt_tokens_details"] = {"cached_tokens": sum(cached)}
        return usage

    def _prompt_counts(self) -> list[tuple[int, int | None]]:
        """Return the tokens of each prompt, as the engine counted if it did, and how many were cached.

        Each prompt is there once, as its first choice says, however many choices share the list of its
        tokens: the later ones find what the first has left in the cache.
        """
        counts: dict[int, tuple[int, int | None]] = {}
        for choice in self._choices:
            prompt, answer = choice.request["token_ids"], choice.answer
            count = answer.prompt_token_count or len(prompt)
            cached = None if answer.cached_tokens is None else min(answer.cached_tokens, count)
            counts.setdefault(id(prompt), (count, cached))
        return list(counts.values())


class _Losses:
    """Logs why requests lost their workers, or failed there without a line in the worker's own log: one a
    second, since a worker that dies takes thousands along."""

    def __init__(self) -> None:
        self._next_at = 0.0
        self._unreported_count = 0

    def report(self, request_id: str | None, error: Exception) -> None:
        """Log one, or count it."""
        now = time.monotonic()
        if now < self._next_at:
            self._unreported_count += 1
            return
        self._next_at = now + 1.0
        others = f" (and {self._unreported_count} more since the last)" if self._unreported_count else ""
        self._unreported_count = 0
        fate = "lost its worker" if worker_lost(error) else "failed at its worker"
        log.warning("request %s %s: %s%s", request_id, fate, error, others)


_losses = _Losses()


async def _read_to_end(items: AsyncIterator[Any]) -> None:
    """Let a worker that has said its last word end by itself: closing now would count as a kill there."""
    with contextlib.suppress(TimeoutError, DynamoRedisError):
        async with asyncio.timeout(_END_GRACE_S):
            async for _ in items:
                pass


# --------------------------------------------------------------------------- plain responses

_SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


def _ordered(frame: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": frame["id"], "object": kind, **frame}


async def send_json(
    send: Send, status: int, content: bytes, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with a JSON document."""
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": content, "more_body": False})


async def send_error(send: Send, error: ApiError, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Answer with an error in OpenAI's form."""
    await send_json(send, error.status, error.body_bytes(), [*error.headers(), *headers])
