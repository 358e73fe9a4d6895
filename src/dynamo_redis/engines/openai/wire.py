"""Parsers of an OpenAI-compatible server's answers, as tokens, and of its errors. Pure.

A server may send tokens as `token_ids` (vLLM, with `return_token_ids`). If it sends text only, the text is
encoded again (`TextTokens`). The tokens have exactly the server's text, but may differ from those that the
model generated. Their number is the one that the server reports (`usage`).

Servers may send values that are not known here. These end no answer and lose no part of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from pydantic_core import from_json

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
"""The reasons other than the regular end; any other word is a regular end."""

_ABORTED: Final = frozenset({"abort", "aborted", "cancelled", "canceled", "error"})
"""The engine's reasons for an answer that it has aborted."""

_ANCHORS: Final = ("", "a", ".", "\n", " ")
"""Texts to encode before a piece, so that the tokenizer does not treat it as the beginning of a text."""

_OVERFLOW: Final = re.compile(
    rb"context[ _-]?(length|size|window)|maximum model length|max_model_len|exceed_context_size",
    re.IGNORECASE,
)
_PARSED: Final = ("tool_calls", "function_call", "reasoning_content", "reasoning")
"""Fields of a chat's delta with parts of the answer that a parser of the engine took out of its text."""

PARSED_BY_ENGINE: Final = (
    "the engine took tool calls or reasoning out of its answer: start it without its tool call parser and "
    "reasoning parser; frontends parse the answers"
)
_U32_END: Final = 1 << 32
_TOKEN_NAME: Final = re.compile(r"token_id:(\d{1,9})")


# --------------------------------------------------------------------------- errors


class UnknownModel(EngineFailed):
    """HTTP 404: the engine has no model of the requested name, or no completions at all."""


def refusal(status: int, content: bytes, retry_after: str | None) -> PlaneError:
    """Return the error of an answer with this HTTP status. `content` is its body, in any form."""
    try:  # the message in the body, if it is of a known form
        body = json.loads(content)
    except ValueError:
        body = content.decode("utf-8", "replace")
    if isinstance(body, dict):
        body = body.get("error", body.get("detail", body.get("message", body)))
    if isinstance(body, dict):
        body = body.get("message", body)
    message = f"the engine answered {status}: {str(body)[:500]}"
    if status in (429, 503):
        try:
            seconds = float(retry_after or "")
        except ValueError:  # a date, or no value
            seconds = math.nan
        kind = RateLimited if status == 429 else Overloaded
        return kind(message, retry_after_s=seconds if 0 <= seconds < math.inf else None)
    if status in (400, 413, 422) and _OVERFLOW.search(content):
        return ContextLengthExceeded(message)
    if status in (400, 413, 422):
        return InvalidRequest(message)
    if status == 404:
        return UnknownModel(message)
    if status in (401, 403):  # the server's message about the key is not for clients
        return EngineFailed(
            f"the engine answered {status}: it does not take this worker's DYN_ENGINE_API_KEY"
        )
    return EngineFailed(message)


# --------------------------------------------------------------------------- the answer


class SseReader:
    """A parser of a Server-Sent Events stream: bytes in, the `data` of its events out.

    An event over `max_bytes` is a ProtocolViolation.
    """

    def __init__(self, max_bytes: int = 16 << 20) -> None:
        self._held = b""
        self._max_bytes = max_bytes

    def feed(self, content: bytes) -> Iterator[bytes]:
        """Yield the data of the events that these bytes complete. The data of an event is one line, as in all
        engines. Raises ProtocolViolation."""
        lines = (self._held + content).split(b"\n")
        self._held = lines.pop()
        if len(self._held) > self._max_bytes:
            raise ProtocolViolation(f"the engine sent an event of more than {self._max_bytes} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


class Tokens(Protocol):
    """Conversions between text and tokens; see `ModelTokens`."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def encode_bytes(self, text: str) -> list[int] | None:
        """Return one token a byte of the text; None if there are no tokens for bytes."""
        ...


class TextTokens:
    """The encoder of one answer's text, piece by piece, to tokens with exactly that text.

    A tokenizer may merge characters across two pieces, and may decode a piece differently at the beginning of
    a text, for example with a space before it. Therefore each piece is encoded in several ways, and the first
    one is taken whose tokens, decoded after those of the piece before, give the piece's text. The last way is
    one token a byte. If the tokenizer has no tokens for bytes, the plain encoding is taken, and counted in
    `inexact_count`.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.inexact_count = 0
        self._tokens = tokens
        self._before: list[int] = []
        """The tokens of the whole piece before: any part of it might begin inside a character."""

    def feed(self, text: str) -> list[int]:
        """Return the tokens of the next piece."""
        if not text:
            return []
        encode, decode = self._tokens.encode, self._tokens.decode

        def encodings() -> Iterator[list[int]]:  # the likeliest first
            for anchor in _ANCHORS:
                yield encode(anchor + text)[len(encode(anchor)) if anchor else 0 :]
            yield encode(f" {text}")
            byte_ids = self._tokens.encode_bytes(text)
            if byte_ids is not None:
                yield byte_ids

        wanted = decode(self._before) + text
        for ids in encodings():
            if decode([*self._before, *ids]) == wanted:
                break
        else:
            ids = encode(text)
            self.inexact_count += 1
        self._before = ids or self._before
        return ids


def _parse(data: bytes) -> Any:
    """Return the JSON value of an event. Raises ProtocolViolation.

    Pydantic's parser takes a third of the time, and no lone surrogates, which some engines send.
    """
    try:
        return from_json(data)
    except ValueError:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise ProtocolViolation(f"the engine sent an event that is not JSON: {exc}") from exc


class CompletionReader:
    """The parser of one streamed completion: events in, items out.

    The last item is kept until the stream ends, since the engine may send the counts of tokens and of cached
    tokens after the last token. The answer is complete if the engine has sent a finish reason, `[DONE]` or
    the token counts; a stream that ends without any of these was cut off.
    """

    def __init__(self, tokens: Tokens, hidden: frozenset[int], limit: int | None = None) -> None:
        """Start an answer. `hidden` are its stop tokens, `limit` is the request's `max_tokens`, if any."""
        self._text = TextTokens(tokens)
        self._hidden = hidden
        self._limit = limit
        self._held: GenerateItem = {"token_ids": []}
        self._reason: str | None = None
        self._usage: dict[str, Any] = {}
        self._cached: int | None = None
        self._count = 0
        self._begun = False
        self._done = False
        self.complete = False
        self.aborted = False
        """True if the engine aborted the answer after it had begun."""

    def items(self, events: Iterable[bytes]) -> Iterator[GenerateItem]:
        """Yield the items of events. Raises as `feed`."""
        for data in events:
            item = self.feed(data)
            if item is not None:
                yield item

    def feed(self, data: bytes) -> GenerateItem | None:
        """Return the item of an event; None if it has none.

        Raises PlaneError for an error or an invalid event.
        """
        if data == DONE:
            self._done = True
            return None
        event = _parse(data)
        if not isinstance(event, dict):
            raise ProtocolViolation("the engine sent an event that is not an object")
        if event.get("error"):
            error = event["error"]
            code = error.get("code") if isinstance(error, dict) else None
            raise refusal(code if isinstance(code, int) else 500, data, None)
        choices, usage, timings = event.get("choices"), event.get("usage"), event.get("timings")
        details = None
        if isinstance(usage, dict):
            self._done |= not choices  # counts without a choice end the answer
            for name in ("prompt_tokens", "completion_tokens"):
                if is_count(usage.get(name)):
                    self._usage[name] = usage[name]
            details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        if cached is None and isinstance(timings, dict):  # llama.cpp
            cached = timings.get("cache_n")
        if is_count(cached):
            self._cached = cached
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return None
        self._begun = True
        return self._item(choices[0])

    def finish(self) -> GenerateItem:
        """Return the last item, after the end of the stream.

        Raises ConnectionLost if the answer is incomplete.
        """
        if self._reason is None and not (self._done and self._begun):
            raise ConnectionLost("the engine ended its answer before it was complete")
        count = self._usage.get("completion_tokens", self._count)
        reason = _FINISH_REASONS.get(self._reason or "", "stop")
        if self._reason in _ABORTED:
            if not self._count:
                raise ConnectionLost(f"the engine aborted the request ({self._reason})")
            self.aborted = True
            reason = "length"  # the client sees that the answer is a part
        elif self._reason is None and self._limit is not None and count >= self._limit:
            reason = "length"
        self.complete = True
        last = self._held
        last["finish_reason"] = reason
        if self._cached is not None:
            last["cached_tokens"] = self._cached
        if self._usage:
            last["completion_usage"] = self._usage  # type: ignore[typeddict-item]
        return last

    def _item(self, choice: dict[str, Any]) -> GenerateItem | None:
        """Return the item of a choice; keep it if the choice has a finish reason."""
        delta = choice.get("delta", choice.get("message"))  # of a chat
        token_ids = choice.get("token_ids")
        if not isinstance(token_ids, list):
            if isinstance(delta, dict):
                if any(delta.get(name) for name in _PARSED):
                    raise EngineFailed(PARSED_BY_ENGINE)
                text = delta.get("content")
            else:
                text = choice.get("text")
            if text is not None and not isinstance(text, str):
                raise ProtocolViolation(f"the engine sent a text that is {type(text).__name__}")
            token_ids = self._text.feed(text or "")
        elif token_ids and (
            set(map(type, token_ids)) != {int} or not 0 <= min(token_ids) <= max(token_ids) < _U32_END
        ):
            raise ProtocolViolation("the engine sent token_ids that are not all token ids")
        self._count += len(token_ids)
        item: GenerateItem = {"token_ids": token_ids}
        if isinstance(logprobs := choice.get("logprobs"), dict):
            item |= _logprobs(logprobs if delta is None else _of_completion(logprobs))
        reason = choice.get("finish_reason")
        if isinstance(reason, dict):  # SGLang's own form
            reason = reason.get("type")
        if reason in (None, ""):
            return item if token_ids else None
        self._reason = str(reason).lower()
        if self._reason not in _FINISH_REASONS and token_ids and token_ids[-1] in self._hidden:
            token_ids = token_ids[:-1]
            for name in ("token_ids", "log_probs", "top_logprobs"):
                if name in item:
                    item[name] = item[name][: len(token_ids)]
        given, self._held = self._held, item
        return given if given["token_ids"] else None


def _logprobs(given: dict[str, Any]) -> GenerateItem:
    """Return the log probabilities of a choice of vLLM, whose tokens have names such as `token_id:42`.

    Nothing is returned of those that are written differently.
    """
    logprobs, tops = given.get("token_logprobs"), given.get("top_logprobs")
    if not isinstance(logprobs, list) or not all(isinstance(each, (int, float)) for each in logprobs):
        return {}
    item: GenerateItem = {"log_probs": logprobs}
    if isinstance(tops, list):
        item["top_logprobs"] = [
            [
                {"token_id": int(found[1]), "logprob": logprob, "rank": rank}
                for rank, (name, logprob) in enumerate(_by_likelihood(top), start=1)
                if (found := _TOKEN_NAME.fullmatch(name)) and isinstance(logprob, (int, float))
            ]
            for top in tops
        ]
    return item


def _of_completion(given: dict[str, Any]) -> dict[str, Any]:
    """Return the log probabilities of a chat in the form of a completion."""
    tokens = given.get("content")
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        return {}
    return {
        "token_logprobs": [token.get("logprob") for token in tokens],
        "top_logprobs": [
            {
                str(top.get("token")): top.get("logprob")
                for top in token.get("top_logprobs") or ()
                if isinstance(top, dict)
            }
            for token in tokens
        ],
    }


def _by_likelihood(top: Any) -> list[tuple[str, Any]]:
    if not isinstance(top, dict) or not all(isinstance(each, (int, float)) for each in top.values()):
        return []
    return sorted(top.items(), key=lambda each: -each[1])
