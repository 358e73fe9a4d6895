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
import logging
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import Any

from dynamo_redis.errors import DynamoRedisError, EngineFailed, ProtocolViolation
from dynamo_redis.frontend.choices import CompletionChoice, Part, Usage
from dynamo_redis.frontend.forms.base import ResponseForm
from dynamo_redis.frontend.http.errors import ApiError, shutting_down, worker_error, worker_lost
from dynamo_redis.frontend.http.responses import EventResponse, Receive, Send, send_json, send_json_pieces
from dynamo_redis.frontend.metrics.recording import RequestRecord
from dynamo_redis.frontend.model import Answer, Generate
from dynamo_redis.parsers.answer_parser import PIECE_SIZE
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.runtime.tracing import Span

log = logging.getLogger(__name__)

_WHOLE_TRIES = 3
"""Most workers that are tried, one after another, for an answer that is sent whole."""

_END_GRACE_S = 1.0
"""Longest time from the item with the finish reason to the end of a worker's answer, in seconds."""

_MOST_LATE_ITEMS = 16
"""Most items of an answer that are read after the one with the finish reason."""

Deliver = Callable[[CompletionChoice, Sequence[Part]], Awaitable[None]]
"""Takes the next parts of a choice's answer, which is over if it has a finish reason."""


class Exchange:
    """Runs the choices of one completion and writes the response."""

    def __init__(
        self,
        form: ResponseForm,
        choices: Sequence[CompletionChoice],
        generate: Generate,
        record: RequestRecord,
        overload_status: int = 503,
        hold: Callable[[int], None] | None = None,
    ) -> None:
        """The exchange ends the `record`. `overload_status` is the HTTP status of a request that finds no
        room. `hold` is called with the bytes of an answer that is sent whole, as it grows; it may raise
        ApiError."""
        self._form = form
        self._choices = choices
        self._generate = generate
        self._record = record
        self._overload_status = overload_status
        self._hold = hold
        self._held_bytes = 0
        self._open = len(choices)
        self._error: ApiError | None = None
        self._hung_up = False
        self._wake = asyncio.Event()

    # ----------------------------------------------------------------- whole

    async def respond(self, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer with one JSON object, or with an error. Returns early if the client hangs up.

        If a worker is lost half-way, another worker answers that choice from the beginning.
        """

        async def collect(choice: CompletionChoice, parts: Sequence[Part]) -> None:
            choice.parts += parts
            if self._hold is not None:
                self._held_bytes += sum(len(part) for part in parts if isinstance(part, str))
                self._hold(self._held_bytes)

        await self._run(receive, collect, tries=_WHOLE_TRIES)
        if self._hung_up:
            return
        if self._error is not None:
            await self._send_error(self._error, send, headers)
            return
        content = self._form.whole(self._choices, Usage.of(self._choices))
        if isinstance(content, bytes):
            await send_json(send, 200, content, headers)
        else:
            await send_json_pieces(send, 200, content, headers)

    # ----------------------------------------------------------------- streamed

    async def stream(self, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer with server-sent events. Returns early if the client hangs up.

        An error before the first item is a JSON response. A later error is an event that ends the stream.
        """
        form = self._form
        encoders = [form.encoder(choice) for choice in self._choices]
        has_begun = [False] * len(encoders)
        response = EventResponse(send, headers)

        async def encode(choice: CompletionChoice, parts: Sequence[Part]) -> None:
            encoder, reason = encoders[choice.index], choice.finish_reason
            events = b""
            if not has_begun[choice.index]:
                has_begun[choice.index] = True
                events = encoder.begin()
            events += encoder.parts(parts)
            if reason is not None:
                events += encoder.end(reason)
            if reason is not None and self._open == 1:
                response.hold(events)
            elif events:
                await response.write(events)

        await self._run(receive, encode, tries=1)
        if self._hung_up:
            return
        if self._error is None:
            await response.end(form.end(self._choices, Usage.of(self._choices)))
        elif response.begun:
            await response.end(form.failure(self._error, self._request_id))
        else:
            await self._send_error(self._error, send, headers)

    # ----------------------------------------------------------------- both

    @property
    def _request_id(self) -> str:
        return self._choices[0].context.id()

    async def _send_error(self, error: ApiError, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        status, body = self._form.errors.response(error, self._request_id)
        await send_json(send, status, body, [*error.headers(), *headers])

    async def _run(
        self,
        receive: Receive,
        deliver: Deliver,
        *,
        tries: int,
    ) -> None:
        """Read all choices, until the first error, the client's leave, or the end of the server's shutdown,
        which cancels this. End every task then."""

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
        except asyncio.CancelledError:  # by the server, at the end of its shutdown: the client is told
            self._error = self._error or shutting_down()
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
            usage = Usage.of(self._choices)
            if self._record.observation is not None:
                self._record.observation.finish_reasons = [
                    choice.finish_reason for choice in self._choices if choice.finish_reason
                ]
            self._record.end(
                self._error,
                has_hung_up=self._hung_up,
                prompt_token_count=usage.prompt_count,
                answer_token_count=usage.answer_count,
                cached_token_count=usage.cached_count,
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
                error = worker_error(exc, self._form.model, begun=choice.begun)
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
                text = answer.feed({"finish_reason": "length"})
                await deliver(choice, choice.parsed([text]))
                return True
            if not self._goes_on(choice, items.instance_id if items else None, is_last=is_last):
                raise
            _log_failure(choice, exc)
            return False
        finally:
            if observation is not None:
                observation.end_call(call, choice.context, None if items is None else items.instance_id)
            if items is not None:
                choice.instance_id = items.instance_id
                await items.aclose()
        return True

    async def _take(self, choice: CompletionChoice, items: list[Any], deliver: Deliver) -> None:
        """Decode items that came together, up to the finish reason, and deliver their parts."""
        answer, record, now = choice.answer, self._record, perf_counter()
        if choice.begun:
            record.gaps_s.add(now - choice.item_at)
        else:
            choice.begun = True
            choice.first_item_at = now
            record.note_first_item(now)
        choice.item_at = now
        texts: list[str] = []
        try:
            for item in items:
                texts.append(answer.feed(item))
                while answer.held:
                    await asyncio.sleep(0)
                    texts.append(answer.feed_held())
                if answer.finish_reason is not None:
                    break
        finally:  # also before an item that is none
            if len(texts) > 1:
                record.gaps_s.add_all([0.0] * (len(texts) - 1))
            if choice.parser is not None and sum(map(len, texts)) > PIECE_SIZE:
                await deliver(choice, await _parsed_in_turns(choice, texts))
            elif texts:
                await deliver(choice, choice.parsed(texts))

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


def _breaks_off(choice: CompletionChoice, error: DynamoRedisError, call: Span | None) -> bool:
    """Return whether an answer has lost its worker half-way, and its client still waits for it."""
    if call is not None:
        call.fail_with(error)
    lost = worker_lost(error) or isinstance(error, EngineFailed)
    return lost and choice.begun and not choice.context.is_stopped()


async def _parsed_in_turns(choice: CompletionChoice, texts: list[str]) -> list[Part]:
    """Return the parts that long texts complete. Other tasks have turns of the event loop meanwhile."""
    found: list[Part] = []
    for parts in choice.parsed_in_pieces(texts):
        found += parts
        await asyncio.sleep(0)
    return found


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
