"""What an OpenAI-compatible server is asked, and what it answers, as tokens. Pure.

The prompt goes as token ids, which vLLM, SGLang and llama.cpp take as `prompt`; tokens come back as
`token_ids` where the server has that (vLLM, with `return_token_ids`). Where it answers with text alone, the
text is encoded anew (`TextTokens`): it is exactly what the server wrote, but which tokens it is cut into, and
so their number, may differ from what the model made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, Protocol

from dynamo_redis.errors import HandlerFailed, InvalidRequest, Overloaded, PlaneError, ProtocolViolation
from dynamo_redis.runtime.llm_protocol import FinishReason, GenerateItem

Dialect = Literal["vllm", "sglang", "llamacpp", "openai"]
"""Whose server it is; `openai` for any other, of which only the standard is expected."""

DONE: Final = b"[DONE]"
"""The last event of a stream."""

_OWNERS: Final[Mapping[str, Dialect]] = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp"}

_STANDARD_SAMPLING: Final = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
_FURTHER_SAMPLING: Final = ("top_k", "min_p", "repetition_penalty")
_FINISH_REASONS: Final[Mapping[str, FinishReason]] = {"stop": "stop", "length": "length"}

_ANCHORS: Final = ("", "a", ".", "\n")
"""Texts to encode a piece behind, so that it is not taken for the beginning of a text."""
_CONTEXT_COUNT: Final = 4
_U32_END: Final = 1 << 32


def dialect_of(models: Mapping[str, Any]) -> Dialect:
    """Whose answer to `GET /v1/models` that is."""
    entries = models.get("data")
    owner = entries[0].get("owned_by") if isinstance(entries, list) and entries else None
    return _OWNERS.get(str(owner).lower(), "openai")


# --------------------------------------------------------------------------- the request


def completion_body(
    request: Mapping[str, Any],
    *,
    model: str,
    dialect: Dialect,
    prompt: Sequence[int] | str,
    dp_rank: int | None,
) -> dict[str, Any]:
    """The body for `POST /v1/completions`. Options that the dialect does not have are left out."""
    stop = _options(request, "stop_conditions")
    sampling = _options(request, "sampling_options")
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    _copy(stop, body, ("max_tokens", "stop"))
    _copy(sampling, body, _STANDARD_SAMPLING)
    if dialect == "openai":
        return body
    _copy(sampling, body, _FURTHER_SAMPLING)
    _copy(stop, body, ("ignore_eos", "min_tokens"))
    if stop.get("stop_token_ids_hidden"):
        body["stop_token_ids"] = stop["stop_token_ids_hidden"]
    if dialect == "llamacpp":
        if "repetition_penalty" in body:
            body["repeat_penalty"] = body.pop("repetition_penalty")
        body["cache_prompt"] = True
    else:
        body["return_token_ids"] = True
    if dialect == "sglang" and dp_rank is not None:
        body["data_parallel_rank"] = dp_rank
    return body


def _options(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = request.get(name) or {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be an object, not {type(value).__name__}")
    return value


def _copy(source: Mapping[str, Any], body: dict[str, Any], names: Sequence[str]) -> None:
    body.update({name: source[name] for name in names if source.get(name) is not None})


def prompt_ids(request: Mapping[str, Any]) -> list[int]:
    """The prompt. Raises InvalidRequest if it is not token ids."""
    token_ids = request.get("token_ids")
    if not isinstance(token_ids, list) or not token_ids or not all(type(token) is int for token in token_ids):
        raise InvalidRequest("token_ids must be a non-empty list of token ids")
    return token_ids


def hidden_stop_ids(request: Mapping[str, Any]) -> frozenset[int]:
    """Tokens that end an answer and are not part of it."""
    stop = _options(request, "stop_conditions")
    eos = [] if stop.get("ignore_eos") else request.get("eos_token_ids") or []
    try:
        return frozenset(eos) | frozenset(stop.get("stop_token_ids_hidden") or [])
    except TypeError as exc:
        raise InvalidRequest(f"stop token ids are not a list of token ids: {exc}") from exc


# --------------------------------------------------------------------------- errors


def refusal(status: int, content: bytes, retry_after: str | None) -> PlaneError:
    """What an answer with that HTTP status means. `content` is its body, whatever it is."""
    message = f"the engine answered {status}: {_message(content)}"
    if status in (429, 503):
        seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
        return Overloaded(message, retry_after_s=seconds)
    if status in (400, 404, 413, 422):
        return InvalidRequest(message)
    return HandlerFailed(message)


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


class TextTokens:
    """One answer's text, piece by piece, as tokens whose text is exactly that.

    A tokenizer may join what two pieces hold apart, and may write a piece differently at a beginning. So each
    is encoded on its own, and what it decodes to behind the tokens before it is held against the text. If
    nothing fits, the plain encoding is taken: `inexact_count` says how often.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.inexact_count = 0
        self._tokens = tokens
        self._context: list[int] = []

    def feed(self, text: str) -> list[int]:
        """The tokens of the next piece."""
        if not text:
            return []
        encode, decode = self._tokens.encode, self._tokens.decode
        wanted = decode(self._context) + text
        for anchor in _ANCHORS:
            ids = encode(anchor + text)[len(encode(anchor)) if anchor else 0 :]
            if decode([*self._context, *ids]) == wanted:
                break
        else:
            ids = encode(text)
            self.inexact_count += 1
        self._context = [*self._context, *ids][-_CONTEXT_COUNT:]
        return ids


class CompletionReader:
    """One streamed completion: events in, items out. The last item is held until the stream ends, since
    what the engine says of its cache may come after the last token."""

    def __init__(self, tokens: Tokens, hidden: frozenset[int]) -> None:
        self._text = TextTokens(tokens)
        self._hidden = hidden
        self._last: GenerateItem | None = None
        self._cached: int | None = None
        self.complete = False

    def feed(self, data: bytes) -> GenerateItem | None:
        """The item that an event makes, if it does. Raises PlaneError for an error, or what is no event."""
        if data == DONE:
            return self.finish()
        try:
            event = json.loads(data)
        except ValueError as exc:
            raise ProtocolViolation(f"the engine sent an event that is not JSON: {exc}") from exc
        if not isinstance(event, dict):
            raise ProtocolViolation("the engine sent an event that is not an object")
        if "error" in event:
            raise _stream_error(event, data)
        self._note_cached(event)
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return None
        return self._item(choices[0])

    def finish(self) -> GenerateItem | None:
        """The last item, once the stream has ended; None if it was taken, or if there is none."""
        last, self._last = self._last, None
        if last is not None:
            self.complete = True
            if self._cached is not None:
                last["cached_tokens"] = self._cached
        return last

    def _item(self, choice: dict[str, Any]) -> GenerateItem | None:
        reason = choice.get("finish_reason")
        token_ids = self._token_ids(choice)
        if reason is None:
            return {"token_ids": token_ids} if token_ids else None
        if reason == "stop" and token_ids and token_ids[-1] in self._hidden:
            token_ids = token_ids[:-1]
        self._last = {"token_ids": token_ids, "finish_reason": _FINISH_REASONS.get(str(reason), "error")}
        return None

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

    def _note_cached(self, event: dict[str, Any]) -> None:
        usage, timings = event.get("usage"), event.get("timings")
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        count = details.get("cached_tokens") if isinstance(details, dict) else None
        if count is None and isinstance(timings, dict):  # llama.cpp
            count = timings.get("cache_n")
        if type(count) is int and count >= 0:
            self._cached = count


def _stream_error(event: dict[str, Any], data: bytes) -> PlaneError:
    error = event["error"]
    code = error.get("code") if isinstance(error, dict) else None
    return refusal(code if isinstance(code, int) else 500, data, None)
