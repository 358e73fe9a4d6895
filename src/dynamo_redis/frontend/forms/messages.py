"""The form of Anthropic's Messages: blocks of content, named events, errors of another form.

Source: the types of Anthropic's own client, and its pages on streaming and errors.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any, Final

from pydantic_core import from_json

from dynamo_redis.frontend.choices import CompletionChoice, Part, Usage
from dynamo_redis.frontend.forms.base import Call, gathered
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.http.sse import escape, named_event
from dynamo_redis.parsers.deltas import CallArguments, CallBegin, Reasoning

OVERLOADED: Final = 529
"""Anthropic's status of a server that has no room."""

_ERROR_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}

_STOP_REASONS: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}


class AnthropicErrors:
    """Errors in Anthropic's form."""

    def response(self, error: ApiError, request_id: str) -> tuple[int, bytes]:
        """See `ErrorForm`."""
        content = json.dumps(error_object(error, request_id), ensure_ascii=False)
        return _status(error), content.encode(errors="replace")


ANTHROPIC_ERRORS: Final = AnthropicErrors()


def _status(error: ApiError) -> int:
    """Return the status of an error: 529 for an overload, unless the settings make it a 429."""
    return OVERLOADED if error.code == "overloaded" and error.status != 429 else error.status


def error_object(error: ApiError, request_id: str) -> dict[str, Any]:
    """Return an error in Anthropic's form."""
    status = _status(error)
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    fault: dict[str, Any] = {"type": kind, "message": error.message}
    if error.param == "thread":  # Anthropic's client then sends the whole conversation
        fault["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": fault, "request_id": request_id}


class MessagesForm:
    """A message."""

    errors = ANTHROPIC_ERRORS

    def __init__(self, model: str, *, wanted_tokens: int | None, hides_thinking: bool = False) -> None:
        """`wanted_tokens` is the client's bound on the answer. With `hides_thinking` blocks of thinking have
        no text."""
        self.model = model
        self.id = f"msg_{uuid.uuid4().hex}"
        self.hides_thinking = hides_thinking
        self._wanted_tokens = wanted_tokens

    def message(self, content: list[Any], usage: Usage, end: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a message. `end` is the reason for its end; None: it has just begun."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            **(end or {"stop_reason": None, "stop_sequence": None}),
            "usage": _counts(usage),
        }

    def whole(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes:
        """See `ResponseForm`."""
        [choice] = choices
        content: list[dict[str, Any]] = []
        for section in gathered(choice.parts):
            if isinstance(section, Call):
                content.append(_tool_use(section))
            elif isinstance(section, Reasoning):
                thinking = "" if self.hides_thinking else section.text
                content.append({"type": "thinking", "thinking": thinking, "signature": self.id})
            elif section.text:
                content.append({"type": "text", "text": section.text})
        message = self.message(content, usage, self._end(choice))
        return json.dumps(message, ensure_ascii=False).encode(errors="replace")

    def encoder(self, choice: CompletionChoice) -> MessageEncoder:
        """See `ResponseForm`."""
        return MessageEncoder(self, choice)

    def end(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes:
        """See `ResponseForm`."""
        [choice] = choices
        change = {"type": "message_delta", "delta": self._end(choice), "usage": _counts(usage)}
        return named_event("message_delta", change) + named_event("message_stop", {"type": "message_stop"})

    def failure(self, error: ApiError, request_id: str) -> bytes:
        """See `ResponseForm`."""
        return named_event("error", error_object(error, request_id))

    def _end(self, choice: CompletionChoice) -> dict[str, Any]:
        stop = choice.answer.stop_found
        reason = choice.finish_reason or "stop"
        granted = choice.request["stop_conditions"].get("max_tokens")
        if stop is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        if reason == "length" and granted != self._wanted_tokens:
            return {"stop_reason": "model_context_window_exceeded", "stop_sequence": None}
        return {"stop_reason": _STOP_REASONS.get(reason, "end_turn"), "stop_sequence": None}


class MessageEncoder:
    """Encodes the events of a message. Parts of one sort that follow each other are one block."""

    def __init__(self, form: MessagesForm, choice: CompletionChoice) -> None:
        self._form = form
        self._choice = choice
        self._index = -1
        self._sort: type[Any] | None = None
        """The class of the parts of the block that is open; None: there is none."""
        self._before = b""
        """The constant start of the open block's deltas."""

    def begin(self) -> bytes:
        """See `ChoiceEncoder`."""
        usage = Usage.of([self._choice])
        started = self._form.message([], Usage(usage.prompt_count, 0, usage.cached_count))
        return named_event("message_start", {"type": "message_start", "message": started})

    def parts(self, parts: Sequence[Part]) -> bytes:
        """See `ChoiceEncoder`. An empty text is no event."""
        events: list[bytes] = []
        for part in parts:
            if isinstance(part, CallBegin):
                block = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
                events.append(self._open(CallArguments, block, "input_json_delta", "partial_json"))
                continue
            text = part if isinstance(part, str) else part.text
            if not text:
                continue
            if isinstance(part, Reasoning):
                if self._sort is not Reasoning:
                    block = {"type": "thinking", "thinking": "", "signature": ""}
                    events.append(self._open(Reasoning, block, "thinking_delta", "thinking"))
                if self._form.hides_thinking:
                    continue
            elif self._sort is not str and not isinstance(part, CallArguments):
                events.append(self._open(str, {"type": "text", "text": ""}, "text_delta", "text"))
            events.append(self._before + escape(text) + b"}}\n\n")
        return b"".join(events)

    def end(self, finish_reason: str) -> bytes:
        """See `ChoiceEncoder`."""
        return self._close()

    def _open(self, sort: type[Any], block: dict[str, Any], delta: str, field: str) -> bytes:
        closed = self._close()
        self._index += 1
        self._sort = sort
        started = {"type": "content_block_start", "index": self._index, "content_block": block}
        start = f'{{"type":"content_block_delta","index":{self._index},"delta":{{"type":"{delta}","{field}":'
        self._before = f"event: content_block_delta\ndata: {start}".encode()
        return closed + named_event("content_block_start", started)

    def _close(self) -> bytes:
        if self._sort is None:
            return b""
        stopped = named_event("content_block_stop", {"type": "content_block_stop", "index": self._index})
        if self._sort is Reasoning:
            signed = {"type": "signature_delta", "signature": self._form.id}
            change = {"type": "content_block_delta", "index": self._index, "delta": signed}
            stopped = named_event("content_block_delta", change) + stopped
        self._sort = None
        return stopped


def _tool_use(call: Call) -> dict[str, Any]:
    """Return the block of a call. Of arguments that were cut off it has the whole members: those that
    Anthropic's client finds in the deltas of a stream."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except ValueError:
        arguments = _whole_members(call.arguments)
    given = arguments if isinstance(arguments, dict) else {}
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": given}


def _whole_members(text: str) -> Any:
    try:
        return from_json(text, allow_partial=True)
    except ValueError:
        return {}


def _counts(usage: Usage) -> dict[str, Any]:
    """Return the counts of tokens. Those of the prompt that were cached do not count as input."""
    cached = usage.cached_count or 0
    counts: dict[str, Any] = {
        "input_tokens": usage.prompt_count - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.answer_count,
    }
    if usage.reasoning_count is not None:
        counts["output_tokens_details"] = {"thinking_tokens": usage.reasoning_count}
    return counts
