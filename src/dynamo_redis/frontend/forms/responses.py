"""The form of OpenAI's Responses: items of output, and an event for each step of theirs.

Source: the types of OpenAI's own client.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dynamo_redis.frontend.choices import CompletionChoice, Part, Usage
from dynamo_redis.frontend.forms.base import Call, ErrorForm, gathered
from dynamo_redis.frontend.forms.completions import OPENAI_ERRORS
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.http.sse import ascii_json, escape
from dynamo_redis.parsers.deltas import CallArguments, CallBegin, Reasoning, Text

_CUT_SHORT: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why an answer is incomplete, by its finish reason."""


class ResponsesForm:
    """A response."""

    errors: ErrorForm = OPENAI_ERRORS

    def __init__(self, model: str, repeated: bytes) -> None:
        """`repeated` are the fields of the body that the response repeats, as a part of a JSON object."""
        self.model = model
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created_at = int(time.time())
        self._repeated = repeated.decode()
        self._event_count = 0
        self.output: list[dict[str, Any]] = []
        """The items so far of a response that is streamed."""

    def event(self, kind: str, **fields: Any) -> bytes:
        """Return an event, with the next number."""
        return self.event_of(kind, ascii_json(fields)[1:-1].encode())

    def event_of(self, kind: str, fields: bytes) -> bytes:
        """Return an event whose fields are a part of a JSON object."""
        number, self._event_count = self._event_count, self._event_count + 1
        name = kind.encode()
        head = b'event: %b\ndata: {"type":"%b","sequence_number":%d,' % (name, name, number)
        return head + fields + b"}\n\n"

    def started(self) -> bytes:
        """Return the events of a response that has begun."""
        response = b'"response":' + self._response("in_progress", [], None)
        return self.event_of("response.created", response) + self.event_of("response.in_progress", response)

    def whole(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes:
        """See `ResponseForm`."""
        [choice] = choices
        status = _status(choice.finish_reason)
        sections = gathered(choice.parts)
        output = [
            item_of(section, "completed" if number < len(sections) else status)
            for number, section in enumerate(sections, 1)
        ]
        return self._response(status, output, usage, choice.finish_reason)

    def encoder(self, choice: CompletionChoice) -> ResponseEncoder:
        """See `ResponseForm`."""
        return ResponseEncoder(self)

    def end(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes:
        """See `ResponseForm`."""
        [choice] = choices
        status = _status(choice.finish_reason)
        response = self._response(status, self.output, usage, choice.finish_reason)
        return self.event_of(f"response.{status}", b'"response":' + response)

    def failure(self, error: ApiError, request_id: str) -> bytes:
        """See `ResponseForm`."""
        code = "rate_limit_exceeded" if error.code in ("overloaded", "rate_limited") else "server_error"
        fault = {"code": code, "message": error.message}
        response = self._response("failed", self.output, None, error=fault)
        return self.event_of("response.failed", b'"response":' + response)

    def _response(
        self,
        status: str,
        output: list[dict[str, Any]],
        usage: Usage | None,
        finish_reason: str | None = None,
        error: Mapping[str, str] | None = None,
    ) -> bytes:
        cut_short = {"reason": _CUT_SHORT[finish_reason or ""]} if status == "incomplete" else None
        fields = {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": error,
            "incomplete_details": cut_short,
            "model": self.model,
            "output": output,
            "usage": None if usage is None else _counts(usage),
        }
        return f"{ascii_json(fields)[:-1]},{self._repeated}}}".encode()


class ResponseEncoder:
    """Encodes the events of a response. Parts of one sort that follow each other are one item."""

    def __init__(self, form: ResponsesForm) -> None:
        self._form = form
        self._item: dict[str, Any] = {}
        """The item that is open; empty: there is none."""
        self._texts: list[str] = []
        """The text of the open item, or its arguments."""
        self._delta = ""
        """The kind of the open item's deltas."""
        self._fields = b""
        """The constant fields of the open item's deltas."""

    def begin(self) -> bytes:
        """See `ChoiceEncoder`."""
        return self._form.started()

    def parts(self, parts: Sequence[Part]) -> bytes:
        """See `ChoiceEncoder`. An empty text is no event."""
        events: list[bytes] = []
        for part in parts:
            if isinstance(part, CallBegin):
                events.append(self._open(Call(part.id, part.name, "")))
                continue
            text = part if isinstance(part, str) else part.text
            if not text:
                continue
            if isinstance(part, Reasoning):
                if self._item.get("type") != "reasoning":
                    events.append(self._open(Reasoning("")))
            elif self._item.get("type") != "message" and not isinstance(part, CallArguments):
                events.append(self._open(Text("")))
            self._texts.append(text)
            events.append(self._form.event_of(self._delta, self._fields + escape(text)))
        return b"".join(events)

    def end(self, finish_reason: str) -> bytes:
        """See `ChoiceEncoder`."""
        return self._close(_status(finish_reason))

    def _open(self, section: Text | Reasoning | Call) -> bytes:
        closed = self._close("completed")
        item = item_of(section, "in_progress")
        part, place = None, self._place(item)
        if isinstance(section, Call):
            self._delta = "response.function_call_arguments.delta"
        else:
            [part] = item["content"]
            item["content"] = []
            place["content_index"] = 0
            self._delta = "response.reasoning_text.delta"
            if isinstance(section, Text):
                self._delta = "response.output_text.delta"
        self._item, self._texts = item, []
        constant = {**place, "logprobs": []} if isinstance(section, Text) else place
        self._fields = f'{ascii_json(constant)[1:-1]},"delta":'.encode()
        added = self._form.event("response.output_item.added", output_index=place["output_index"], item=item)
        if part is not None:
            added += self._form.event("response.content_part.added", **place, part=part)
        return closed + added

    def _close(self, status: str) -> bytes:
        """Return the events that end the open item."""
        item, text = self._item, "".join(self._texts)
        if not item:
            return b""
        event, place = self._form.event, self._place(item)
        if item["type"] == "function_call":
            item = {**item, "arguments": text, "status": status}
            done = event("response.function_call_arguments.done", **place, name=item["name"], arguments=text)
        else:
            section = Reasoning(text) if item["type"] == "reasoning" else Text(text)
            item = {**item_of(section, status), "id": item["id"]}
            [part] = item["content"]
            place["content_index"] = 0
            if isinstance(section, Text):
                done = event("response.output_text.done", **place, text=text, logprobs=[])
            else:
                done = event("response.reasoning_text.done", **place, text=text)
            done += event("response.content_part.done", **place, part=part)
        done += event("response.output_item.done", output_index=place["output_index"], item=item)
        self._form.output.append(item)
        self._item = {}
        return done

    def _place(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._form.output)}


def item_of(section: Text | Reasoning | Call, status: str) -> dict[str, Any]:
    """Return the item of a section of an answer."""
    unique = uuid.uuid4().hex
    if isinstance(section, Call):
        return {
            "id": f"fc_{unique}",
            "type": "function_call",
            "call_id": section.id,
            "name": section.name,
            "arguments": section.arguments,
            "status": status,
        }
    if isinstance(section, Reasoning):
        content = {"type": "reasoning_text", "text": section.text}
        return {
            "id": f"rs_{unique}",
            "type": "reasoning",
            "summary": [],
            "content": [content],
            "encrypted_content": None,
            "status": status,
        }
    text = {"type": "output_text", "text": section.text, "annotations": [], "logprobs": []}
    return {
        "id": f"msg_{unique}",
        "type": "message",
        "role": "assistant",
        "content": [text],
        "status": status,
    }


def _status(finish_reason: str | None) -> str:
    return "incomplete" if finish_reason in _CUT_SHORT else "completed"


def _counts(usage: Usage) -> dict[str, Any]:
    """Return the counts of tokens."""
    return {
        "input_tokens": usage.prompt_count,
        "input_tokens_details": {"cached_tokens": usage.cached_count or 0, "cache_write_tokens": 0},
        "output_tokens": usage.answer_count,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_count or 0},
        "total_tokens": usage.prompt_count + usage.answer_count,
    }
