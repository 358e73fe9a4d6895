"""The access line and the spans of an HTTP request.

An application is wrapped by `observed` only if lines or traces are wanted. Otherwise a request costs a look
into its scope.
"""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any, Final, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo_redis.names import format_instance_id
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime import tracing

Kind = Literal["chat", "text", "messages", "responses", "embeddings"]
"""The APIs whose requests go to workers."""

OBSERVATION: Final = "dynamo_redis.observation"
"""The key of a request's `Observation` in its scope."""

access_log = logging.getLogger("dynamo_redis.access")

_OPERATIONS: Final[dict[Kind, str]] = {
    "chat": "chat",
    "text": "text_completion",
    "messages": "chat",
    "responses": "chat",
    "embeddings": "embeddings",
}
_PATH_CHARS: Final = 200
_PLAIN: Final = re.compile(r"[\w./:@+~%-]+", re.ASCII)
_CLIENT_LEFT: Final = 499
"""nginx's status for a client that left before the answer."""


class Observation:
    """One request from its head to the end of its answer. The steps of a completion note here what they know.

    It never holds a header's value or a part of a prompt or answer.
    """

    __slots__ = (
        "_began_at",
        "_began_at_ns",
        "_first_item_at",
        "_method",
        "_operation",
        "_path",
        "_span",
        "answer_token_count",
        "cached_token_count",
        "error_type",
        "finish_reasons",
        "model",
        "prompt_token_count",
        "status",
    )

    def __init__(self, scope: Scope) -> None:
        self._began_at = time.perf_counter()
        self._began_at_ns = time.time_ns()
        self._method: str = scope["method"]
        raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
        self._path = raw_path[:_PATH_CHARS].decode("ascii", "backslashreplace")
        self._first_item_at: float | None = None
        self._operation: str | None = None
        self._span: tracing.Span | None = None
        self.status: int | None = None
        self.error_type = ""
        self.model: str | None = None
        self.prompt_token_count: int | None = None
        self.answer_token_count: int | None = None
        self.cached_token_count: int | None = None
        self.finish_reasons: list[str] = []

    # ----------------------------------------------------------------- steps of a completion

    def begin(self, kind: Kind, context: Context) -> None:
        """Begin the request's span, if traces are exported, as the context's. Call it once."""
        if tracing.tracer is None:
            return
        self._operation = _OPERATIONS[kind]
        self._span = tracing.tracer.begin(
            self._operation,
            "server",
            context.traceparent,
            {
                "gen_ai.operation.name": self._operation,
                "gen_ai.provider.name": "dynamo_redis",
                "http.request.method": self._method,
                "url.path": self._path,
                "dynamo.request.id": context.id(),
            },
            at_ns=self._began_at_ns,
        )
        context.traceparent = self._span.traceparent

    def note_prepared(
        self, model: str, choice_count: int, *, is_stream: bool, max_tokens: int | None
    ) -> None:
        """Note that the body is read, rendered and tokenized."""
        self.model = model
        if tracing.tracer is None or self._span is None:
            return
        self._span.rename(f"{self._operation} {model}")
        self._span.set(
            {
                "gen_ai.request.model": model,
                "gen_ai.request.choice.count": choice_count if choice_count > 1 else None,
                "gen_ai.request.max_tokens": max_tokens,
                "gen_ai.request.stream": is_stream,
            }
        )
        preparing = tracing.tracer.begin(
            "prepare", "internal", self._span.traceparent, at_ns=self._began_at_ns
        )
        preparing.end()

    def begin_call(self, context: Context, index: int) -> tracing.Span | None:
        """Begin the span of a choice's call to a worker, as the context's; None without traces."""
        if tracing.tracer is None or self._span is None:
            return None
        call = tracing.tracer.begin(
            "generate", "client", self._span.traceparent, {"dynamo.choice.index": index}
        )
        context.traceparent = call.traceparent
        return call

    def end_call(self, call: tracing.Span | None, context: Context, instance_id: int | None) -> None:
        """End the span of a call. `instance_id` is the instance that it was at last, if there was one."""
        if call is None:
            return
        if instance_id is not None:
            call.set({"dynamo.instance.id": format_instance_id(instance_id)})
        if context.is_killed():
            call.fail("cancelled")
        call.end()

    def note_first_item(self, now: float) -> None:
        """Note the first item of the answer. `now` is on `time.perf_counter`."""
        self._first_item_at = now

    def note_migration(self) -> None:
        """Note that an answer goes on at another worker."""
        if self._span is not None:
            self._span.add_event("migration")

    # ----------------------------------------------------------------- the end

    def end(self, *, logs: bool) -> None:
        """End the span, and write the access line if `logs`."""
        status = self.status or _CLIENT_LEFT
        first_item_s = None if self._first_item_at is None else self._first_item_at - self._began_at
        if self._span is not None:
            self._end_span(self._span, status, first_item_s)
        if logs:
            fields: dict[str, Any] = {
                "method": self._method,
                "path": self._path,
                "status": status,
                "model": self.model,
                "prompt_tokens": self.prompt_token_count,
                "completion_tokens": self.answer_token_count,
                "time_to_first_token_s": _rounded(first_item_s),
                "duration_s": _rounded(time.perf_counter() - self._began_at),
                "error": self.error_type or None,
            }
            fields = {name: value for name, value in fields.items() if value is not None}
            shown = dict(fields)
            words = [_word(shown.pop(name)) for name in ("method", "path", "status")]
            words += [f"{name}={_word(value)}" for name, value in shown.items()]
            access_log.info("%s", " ".join(words), extra={"fields": fields})

    def _end_span(self, span: tracing.Span, status: int, first_item_s: float | None) -> None:
        span.set(
            {
                "http.response.status_code": status,
                "gen_ai.response.model": self.model,
                "gen_ai.response.finish_reasons": self.finish_reasons or None,
                "gen_ai.response.time_to_first_chunk": first_item_s,
                "gen_ai.usage.input_tokens": self.prompt_token_count,
                "gen_ai.usage.output_tokens": self.answer_token_count,
                "gen_ai.usage.cache_read.input_tokens": self.cached_token_count,
            }
        )
        if status >= 500 or status == _CLIENT_LEFT or (self.error_type and status < 400):
            span.fail(self.error_type or ("cancelled" if status == _CLIENT_LEFT else str(status)))
        elif self.error_type:  # the client's own error is none of the server's span
            span.set({"error.type": self.error_type})
        span.end()


def observed(app: ASGIApp, *, logs: bool) -> ASGIApp:
    """Return the application, with an access line for each request if `logs`, and spans of completions while
    traces are exported."""
    if not logs and tracing.tracer is None:
        return app
    if logs:
        access_log.setLevel(logging.INFO)  # they were asked for, whatever the level of the others

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        observation = scope[OBSERVATION] = Observation(scope)

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                observation.status = message["status"]
            await send(message)

        try:
            await app(scope, receive, send_noted)
        finally:
            observation.end(logs=logs)

    return serve


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _word(value: object) -> str:
    """Return a value as one word of the line: text of peers is quoted unless it is plain."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
