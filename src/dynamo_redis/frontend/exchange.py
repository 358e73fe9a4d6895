"""One request and its response: from workers' items to HTTP, whole or as server-sent events.

Each request has these tasks, all ended before the response ends: the server's own task, which waits for the
others and ends the response; one task that waits for the client to hang up, and then kills the request at its
workers; and one task for each choice, which reads a worker's items and writes their events. All items that
have come meanwhile share a write. The HTTP server bounds the unsent bytes: over its limit a task waits in its
write, and the plane's flow control holds the worker back. So a slow client costs no more memory.

These tasks write, never the code that receives frames from a worker: a client that has left delays no other
client's stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from time import perf_counter
from typing import Any

from dynamo_redis.errors import DynamoRedisError, EngineFailed, ProtocolViolation
from dynamo_redis.frontend.answers import AnswerDecoder
from dynamo_redis.frontend.http.errors import ApiError, worker_error, worker_lost
from dynamo_redis.frontend.http.sse import DONE, ChunkEncoder, Kind, event
from dynamo_redis.frontend.metrics.recording import RequestRecord
from dynamo_redis.frontend.migration import Migration
from dynamo_redis.frontend.model import Answer, Generate
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.planes.context import Context
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.runtime.tracing import Span

log = logging.getLogger(__name__)

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

_WHOLE_TRIES = 3
"""Most workers that are tried, one after another, for an answer that is sent whole."""

_END_GRACE_S = 1.0
"""Longest time from the item with the finish reason to the end of a worker's answer, in seconds."""

_MOST_LATE_ITEMS = 16
"""Most items of an answer that are read after the one with the finish reason."""

Deliver = Callable[["CompletionChoice", list[str]], Awaitable[None]]
"""Takes the texts of a choice's next items, and its finish reason if the last one has it."""


class CompletionChoice:
    """One choice of a completion: its request, and the part of the answer that has arrived."""

    __slots__ = ("answer", "begun", "context", "index", "item_at", "migration", "pieces", "request")

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        answer: AnswerDecoder,
        context: Context,
        migration: Migration | None = None,
    ) -> None:
        """`migration` has the answer go on at another worker if its worker is lost; None: it ends then."""
        self.index = index
        self.request = request
        self.answer = answer
        self.context = context
        self.migration = migration
        self.begun = False
        """True once part of the answer has arrived."""
        self.item_at = 0.0
        """The time of its last item, on `time.perf_counter`."""
        self.pieces: list[str] = []

    def restart(self) -> None:
        """Forget the answer so far: another worker answers from the beginning."""
        self.begun = False
        self.pieces.clear()
        self.answer.restart()


class Exchange:
    """Runs the choices of one completion and writes the response."""

    def __init__(
        self,
        kind: Kind,
        frame: dict[str, Any],
        choices: Sequence[CompletionChoice],
        generate: Generate,
        record: RequestRecord,
        overload_status: int = 503,
    ) -> None:
        """`frame` holds the fields of every chunk and of the whole response: id, created, model. The exchange
        ends the `record`. `overload_status` is the HTTP status of a request for which there is no room."""
        self._kind: Kind = kind
        self._frame = frame
        self._choices = choices
        self._generate = generate
        self._record = record
        self._overload_status = overload_status
        self._open = len(choices)
        self._error: ApiError | None = None
        self._hung_up = False
        self._wake = asyncio.Event()

    # ----------------------------------------------------------------- whole

    async def respond(self, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer with one JSON object, or with an error. Returns early if the client hangs up.

        If a worker is lost half-way, another worker answers that choice from the beginning.
        """

        async def collect(choice: CompletionChoice, texts: list[str]) -> None:
            choice.pieces += texts

        await self._run(receive, collect, tries=_WHOLE_TRIES)
        if self._hung_up:
            return
        if self._error is not None:
            await send_error(send, self._error, headers)
            return
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
        completion = {**_ordered(self._frame, kind), "choices": choices, "usage": self._usage()}
        body = json.dumps(completion, ensure_ascii=False).encode(errors="replace")
        await send_json(send, 200, body, headers)

    # ----------------------------------------------------------------- streamed

    async def stream(
        self, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]], *, includes_usage: bool
    ) -> None:
        """Answer with server-sent events. Returns early if the client hangs up.

        An error before the first item is a JSON response. A later error is an event that ends the stream.
        """
        kind = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        frame = _ordered(self._frame, kind)
        encoders = [
            ChunkEncoder(self._kind, frame, choice.index, includes_usage=includes_usage)
            for choice in self._choices
        ]
        response = EventResponse(send, headers)

        async def encode(choice: CompletionChoice, texts: list[str]) -> None:
            encoder, reason = encoders[choice.index], choice.answer.finish_reason
            events: list[bytes] = []
            if not choice.pieces:
                events.append(encoder.begin())
                choice.pieces.append("")
            if reason is not None and not texts[-1]:
                texts.pop()
            events += map(encoder.delta, texts)
            if reason is not None:
                events.append(encoder.end(reason))
            if reason is not None and self._open == 1:
                response.hold(b"".join(events))
            else:
                await response.write(b"".join(events))

        await self._run(receive, encode, tries=1)
        if self._hung_up:
            return
        if self._error is not None:
            if response.begun:
                await response.end(event(self._error.body()))
            else:
                await send_error(send, self._error, headers)
        elif includes_usage:
            await response.end(event({**frame, "choices": [], "usage": self._usage()}) + DONE)
        else:
            await response.end(DONE)

    # ----------------------------------------------------------------- both

    async def _run(
        self,
        receive: Receive,
        deliver: Deliver,
        *,
        tries: int,
    ) -> None:
        """Read all choices, until the first error or the client's leave. End every task then, or when this is
        cancelled."""

        async def wait_for_hang_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._hung_up = True
            for choice in self._choices:
                choice.context.kill()
            self._wake.set()

        readers = [asyncio.create_task(self._read(choice, deliver, tries)) for choice in self._choices]
        watcher = asyncio.create_task(wait_for_hang_up())
        try:
            while self._open and self._error is None and not self._hung_up:
                self._wake.clear()
                await self._wake.wait()
        finally:
            watcher.cancel()
            for choice in self._choices:
                choice.context.kill()  # no effect on one that has ended
            left = [reader for reader in readers if not reader.done()]
            for reader in left:
                reader.cancel()
            if left:
                await asyncio.wait(left)
            for reader in readers:
                if not reader.cancelled() and (defect := reader.exception()) is not None:
                    log.error("the reader of an answer failed", exc_info=defect)
            usage = self._usage()
            if self._record.observation is not None:
                self._record.observation.finish_reasons = [
                    choice.answer.finish_reason for choice in self._choices if choice.answer.finish_reason
                ]
            self._record.end(
                self._error,
                has_hung_up=self._hung_up,
                prompt_token_count=usage["prompt_tokens"],
                answer_token_count=usage["completion_tokens"],
                cached_token_count=usage.get("prompt_tokens_details", {}).get("cached_tokens"),
            )

    async def _read(
        self,
        choice: CompletionChoice,
        deliver: Deliver,
        tries: int,
    ) -> None:
        """Read an answer to its end.

        If it breaks off, read it again from its beginning, `tries` times in all.
        """
        complete = False
        try:
            while not complete:
                tries -= 1
                complete = await self._read_once(choice, deliver, is_last=tries <= 0)
        except Exception as exc:
            if not isinstance(exc, (DynamoRedisError, ApiError)):
                log.exception("request %s failed", choice.context.id())
            elif worker_lost(exc) or isinstance(exc, (EngineFailed, ProtocolViolation)):
                _log_failure(choice, exc)
            if self._error is None:
                error = worker_error(exc, self._frame["model"], begun=choice.begun)
                self._error = error.with_overload_as(self._overload_status)
        finally:
            if (
                not complete and self._error is None
            ):  # however this task ends, a part is never sent as the whole
                self._error = ApiError(
                    500,
                    "The answer is incomplete: send the request again.",
                    kind="server_error",
                    code="internal",
                )
            self._open -= 1
            self._wake.set()

    async def _read_once(
        self,
        choice: CompletionChoice,
        deliver: Deliver,
        *,
        is_last: bool,
    ) -> bool:
        """Read an answer to its end. Return False if its worker was lost, and another is to be asked."""
        answer, migration, observation = choice.answer, choice.migration, self._record.observation
        call = None if observation is None else observation.begin_call(choice.context, choice.index)
        items: Answer | None = None
        got_item = False
        try:
            if migration is None:
                items = await self._generate(choice.request, choice.context, ())
            else:
                items = await migration.send(self._generate, choice.context)
            while answer.finish_reason is None and (arrived := await items.next_items()):
                if not choice.begun:
                    self._record.note_resent(items.resent_count)
                got_item = True
                await self._take(choice, arrived, deliver)
            answer.check_complete()
            if not answer.cut_off and not items.is_over:
                await _wait_for_end(items)
        except DynamoRedisError as exc:
            breaks_off = _breaks_off(choice, exc, call)
            if migration is not None and not got_item and await migration.may_try_again(exc, choice.context):
                return False
            if not breaks_off:
                raise
            if migration is not None and migration.is_whole(answer):
                await deliver(choice, [answer.feed({"finish_reason": "length"})])
                return True
            if not self._goes_on(choice, items.instance_id if items else None, is_last=is_last):
                raise
            _log_failure(choice, exc)
            return False
        finally:
            if observation is not None:
                observation.end_call(call, choice.context, None if items is None else items.instance_id)
            if items is not None:
                await items.aclose()
        return True

    async def _take(self, choice: CompletionChoice, items: list[Any], deliver: Deliver) -> None:
        """Decode items that came together, up to the finish reason, and deliver their texts."""
        answer, record, now = choice.answer, self._record, perf_counter()
        if choice.begun:
            record.gaps_s.add(now - choice.item_at)
        else:
            choice.begun = True
            record.note_first_item(now)
        choice.item_at = now
        texts: list[str] = []
        try:
            for item in items:
                texts.append(answer.feed(item))
                if answer.finish_reason is not None:
                    break
        finally:  # also before an item that is none
            if len(texts) > 1:
                record.gaps_s.add_all([0.0] * (len(texts) - 1))
            if texts:
                await deliver(choice, texts)

    def _goes_on(self, choice: CompletionChoice, lost_at: int | None, *, is_last: bool) -> bool:
        """Prepare another try after a worker was lost: from where the answer is, or from its beginning.

        Return False if there is none."""
        migration = choice.migration
        if migration is not None and migration.may_move(choice.answer):
            migration.move(choice.answer, lost_at)
            self._record.note_migration()
            return True
        if not is_last:
            choice.restart()
        return not is_last

    def _usage(self) -> dict[str, Any]:
        completion = sum(choice.answer.token_count for choice in self._choices)
        # Each prompt counts once, by its first choice, however many choices share its list of tokens: later
        # choices find cached tokens that the first one has put there.
        prompts: dict[int, tuple[int, int | None]] = {}  # id of the list → its tokens, the cached ones
        for choice in self._choices:
            token_ids, answer = choice.request["token_ids"], choice.answer
            count = answer.prompt_token_count or len(token_ids)
            cached_count = None if answer.cached_tokens is None else min(answer.cached_tokens, count)
            prompts.setdefault(id(token_ids), (count, cached_count))
        prompt = sum(count for count, _ in prompts.values())
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        cached = [count for _, count in prompts.values() if count is not None]
        if cached:
            usage["prompt_tokens_details"] = {"cached_tokens": sum(cached)}
        return usage


def _breaks_off(choice: CompletionChoice, error: DynamoRedisError, call: Span | None) -> bool:
    """Return whether an answer has lost its worker half-way, and its client still waits for it."""
    if call is not None:
        call.fail_with(error)
    lost = worker_lost(error) or isinstance(error, EngineFailed)
    return lost and choice.begun and not choice.context.is_stopped()


async def _wait_for_end(items: Answer) -> None:
    """Wait until a worker that has sent its last item ends by itself: a close now would count as a kill.

    Items that come all the same are not used, and many are not read.
    """
    with contextlib.suppress(TimeoutError, DynamoRedisError):
        async with asyncio.timeout(_END_GRACE_S):
            count = 0
            while count < _MOST_LATE_ITEMS and (late := await items.next_items()):
                count += len(late)


_failures = RateLimitedLog(log, pause_s=1.0)  # a worker that dies ends thousands of requests


def _log_failure(choice: CompletionChoice, error: Exception) -> None:
    """Log that a request lost its worker, or failed there without a line in the worker's own log."""
    failure = "lost its worker" if worker_lost(error) else "failed at its worker"
    _failures.log("request %s %s: %s", choice.context.id(), failure, error)


class EventResponse:
    """A response of server-sent events, which several tasks may write."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self._starting = asyncio.Lock()
        self._held = b""
        self.begun = False
        """True once there is a part of the response."""

    async def write(self, events: bytes) -> None:
        """Write events, and before the first ones the head. Waits for a client that reads slowly."""
        if not self.begun:
            async with self._starting:
                if not self.begun:
                    await self._send(
                        {"type": "http.response.start", "status": 200, "headers": [*_SSE, *self._headers]}
                    )
                    self.begun = True
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    def hold(self, events: bytes) -> None:
        """Keep the last events, to be written with the end."""
        self._held = events

    async def end(self, events: bytes) -> None:
        """Write the held events and the last ones, and end the response."""
        if not self.begun:
            await self.write(b"")
        await self._send({"type": "http.response.body", "body": self._held + events, "more_body": False})


# --------------------------------------------------------------------------- plain responses

_SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # else nginx buffers the events
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
