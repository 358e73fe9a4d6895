"""Answers of an OpenAI-compatible server, read as tokens, and the meaning of its refusals. Pure.

Tokens come back as `token_ids` where the server has that (vLLM, with `return_token_ids`). Where it answers
with text alone, the text is encoded anew (`TextTokens`): it is exactly what the server wrote, but which
tokens it is cut into may differ from what the model made. How many there were is what the server says
(`usage`).

A server's list of values is never closed: what is not known here ends no answer and loses none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from dynamo_redis.errors import (
    ConnectionLost,
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    PlaneError,
    ProtocolViolation,
    RateLimited,
)
from dynamo_redis.models.llm_protocol import FinishReason, GenerateItem, is_count

DONE: Final = b"[DONE]"
"""The last event of a stream."""

_FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    **dict.fromkeys(("length", "max_tokens", "max_new_tokens", "max_length", "model_length"), "length"),
    "content_filter": "content_filter",
}
"""Those that are not the answer's own end; any other is."""

_GIVEN_UP: Final = frozenset({"abort", "aborted", "cancelled", "canceled", "error"})
"""The engine's own reasons for an answer that it did not bring to its end."""

_ANCHORS: Final = ("", "a", ".", "\n", " ")
"""Texts to encode a piece behind, so that it is not taken for the beginning of a text."""

_OVERFLOW: Final = re.compile(
    rb"context[ _-]?(length|size|window)|maximum model length|max_model_len|exceed_context_size",
    re.IGNORECASE,
)
_U32_END: Final = 1 << 32


# --------------------------------------------------------------------------- errors


class UnknownModel(EngineFailed):
    """The engine has no model of the name that it was asked for (or no completions at all): HTTP 404."""


def refusal(status: int, content: bytes, retry_after: str | None) -> PlaneError:
    """What an answer with that HTTP status means. `content` is its body, whatever it is."""
    message = f"the engine answered {status}: {_message(content)}"
    if status in (429, 503):
        seconds = _seconds(retry_after)
        kind = RateLimited if status == 429 else Overloaded
        return kind(message, retry_after_s=seconds)
    if status in (400, 413, 422) and _OVERFLOW.search(content):
        return ContextLengthExceeded(message)
    if status in (400, 413, 422):
        return InvalidRequest(message)
    if status == 404:
        return UnknownModel(message)
    if status in (401, 403):  # what it says of the key is not for clients
        return EngineFailed(
            f"the engine answered {status}: it does not take this worker's DYN_ENGINE_API_KEY"
        )
    return EngineFailed(message)


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a `Retry-After`; None for a date, and for what is neither."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _message(content: bytes) -> str:
    try:
        body = json.loads(content)
    except ValueError:
        body = content.decode("utf-8", "replace")
    if isinstance(body, dict):
        body = body.get("error", body.get("detail", body.get("message", body)))
    if isinstance(body, dict):
        body = body.get("message", body)
    return str(body)[:500]


# --------------------------------------------------------------------------- the answer


class SseReader:
    """Bytes of a Server-Sent Events stream in, the `data` of its events out. Bounded: an event over
    `max_bytes` is a ProtocolViolation."""

    def __init__(self, max_bytes: int = 16 << 20) -> None:
        self._held = b""
        self._max_bytes = max_bytes

    def feed(self, content: bytes) -> Iterator[bytes]:
        """The events that these bytes complete. An event's data is one line here, as all engines write it."""
        lines = (self._held + content).split(b"\n")
        self._held = lines.pop()
        if len(self._held) > self._max_bytes:
            raise ProtocolViolation(f"the engine sent an event of more than {self._max_bytes} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


class Tokens(Protocol):
    """Text to tokens and back; `tokenizers.Tokenizer` behind it."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def spell(self, text: str) -> list[int] | None:
        """The text byte by byte, or None if there are no tokens for single bytes."""
        ...


class TextTokens:
    """One answer's text, piece by piece, as tokens whose text is exactly that.

    A tokenizer may join what two pieces hold apart, and may write a piece differently at a beginning: with a
    space before it, for one. So each is encoded on its own, and what it decodes to behind the piece before it
    is held against the text. If no way of cutting it fits, it is spelled in bytes. Where the tokenizer has no
    bytes either, the plain encoding is taken: `inexact_count` says how often.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.inexact_count = 0
        self._tokens = tokens
        self._before: list[int] = []
        """The piece before, whole: cut anywhere else, it may begin inside a character."""

    def feed(self, text: str) -> list[int]:
        """The tokens of the next piece."""
        if not text:
            return []
        decode = self._tokens.decode
        wanted = decode(self._before) + text
        for ids in self._cuts(text):
            if decode([*self._before, *ids]) == wanted:
                break
        else:
            ids = self._tokens.encode(text)
            self.inexact_count += 1
        self._before = ids or self._before
        return ids

    def _cuts(self, text: str) -> Iterator[list[int]]:
        encode = self._tokens.encode
        for anchor in _ANCHORS:
            yield encode(anchor + text)[len(encode(anchor)) if anchor else 0 :]
        yield encode(f" {text}")
        spelled = self._tokens.spell(text)
        if spelled is not None:
            yield spelled


class CompletionReader:
    """One streamed completion: events in, items out. The last item is held until the stream ends, since
    what the engine says of its tokens and its cache may come after the last of them.

    The answer has ended when the engine says why, or that it is done, or how many tokens it had; a stream
    that ends without any of these was cut off.
    """

    def __init__(self, tokens: Tokens, hidden: frozenset[int], limit: int | None = None) -> None:
        """`limit` is the most tokens that were asked for, if that was said."""
        self._text = TextTokens(tokens)
        self._hidden = hidden
        self._limit = limit
        self._held: list[int] = []
        self._reason: str | None = None
        self._usage: dict[str, Any] = {}
        self._cached: int | None = None
        self._count = 0
        self._begun = False
        self._done = False
        self.complete = False
        self.gave_up = False
        """Whether the engine gave the answer up after it had begun."""

    def feed(self, data: bytes) -> GenerateItem | None:
        """The item that an event makes, if it does. Raises PlaneError for an error, or what is no event."""
        if data == DONE:
            self._done = True
            return None
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise ProtocolViolation(f"the engine sent an event that is not JSON: {exc}") from exc
        if not isinstance(event, dict):
            raise ProtocolViolation("the engine sent an event that is not an object")
        if event.get("error"):
            raise _stream_error(event, data)
        choices = event.get("choices")
        self._note_usage(event, is_last=not choices)
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return None
        self._begun = True
        return self._item(choices[0])

    def finish(self) -> GenerateItem:
        """The last item, once the stream has ended. Raises ConnectionLost if the answer has not."""
        if self._reason is None and not (self._done and self._begun):
            raise ConnectionLost("the engine ended its answer before it was complete")
        count = self._usage.get("completion_tokens", self._count)
        reason = _FINISH_REASONS.get(self._reason or "", "stop")
        if self._reason in _GIVEN_UP:
            if not self._count:
                raise ConnectionLost(f"the engine gave the request up ({self._reason})")
            self.gave_up = True
            reason = "length"  # a part, and shown as one
        elif self._reason is None and self._limit is not None and count >= self._limit:
            reason = "length"
        self.complete = True
        last: GenerateItem = {"token_ids": self._held, "finish_reason": reason}
        if self._cached is not None:
            last["cached_tokens"] = self._cached
        if self._usage:
            last["completion_usage"] = self._usage  # type: ignore[typeddict-item]
        return last

    def _item(self, choice: dict[str, Any]) -> GenerateItem | None:
        token_ids = self._token_ids(choice)
        self._count += len(token_ids)
        reason = choice.get("finish_reason")
        if isinstance(reason, dict):  # SGLang's own form
            reason = reason.get("type")
        if reason in (None, ""):
            return {"token_ids": token_ids} if token_ids else None
        self._reason = str(reason).lower()
        if self._reason not in _FINISH_REASONS and token_ids and token_ids[-1] in self._hidden:
            token_ids = token_ids[:-1]
        given, self._held = self._held, token_ids
        return {"token_ids": given} if given else None

    def _token_ids(self, choice: dict[str, Any]) -> list[int]:
        token_ids = choice.get("token_ids")
        if isinstance(token_ids, list):
            if not all(type(token) is int and 0 <= token < _U32_END for token in token_ids):
                raise ProtocolViolation("the engine sent token_ids that are not all token ids")
            return token_ids
        text = choice.get("text")
        if text is not None and not isinstance(text, str):
            raise ProtocolViolation(f"the engine sent a text that is {type(text).__name__}")
        return self._text.feed(text or "")

    def _note_usage(self, event: dict[str, Any], *, is_last: bool) -> None:
        usage, timings = event.get("usage"), event.get("timings")
        if isinstance(usage, dict):
            self._done |= is_last
            for name in ("prompt_tokens", "completion_tokens"):
                if is_count(usage.get(name)):
                    self._usage[name] = usage[name]
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        count = details.get("cached_tokens") if isinstance(details, dict) else None
        if count is None and isinstance(timings, dict):  # llama.cpp
            count = timings.get("cache_n")
        if is_count(count):
            self._cached = count


def _stream_error(event: dict[str, Any], data: bytes) -> PlaneError:
    error = event["error"]
    code = error.get("code") if isinstance(error, dict) else None
    return refusal(code if isinstance(code, int) else 500, data, None)
