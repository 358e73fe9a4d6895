"""Decoding of one answer: a worker's items in, text out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from dynamo_redis.errors import (
    ConnectionLost,
    EngineFailed,
    HandlerFailed,
    InvalidRequest,
    ProtocolViolation,
    RequestCancelled,
)
from dynamo_redis.frontend.reasoning_tokens import ReasoningTokens
from dynamo_redis.frontend.tokens import Detokenizer, StopStrings
from dynamo_redis.models.llm_protocol import is_count

SLACK_TOKENS: Final = 1 << 16
"""Tokens beyond the model's context after which an answer is taken for nonsense: an engine's context may be
longer than its card says."""

_MOST_TOKENS: Final = 1 << 53
_SHOWN_CHARS: Final = 200
_LISTS: Final = (list, tuple)


_LEAST_LOGPROB: Final = -9999.0
"""Stands for minus infinity, which JSON does not have. The value is vLLM's."""


class TokenLogprob(NamedTuple):
    """The log probability of a token of the answer, and of the likeliest tokens at its place."""

    token: bytes
    logprob: float
    top: list[tuple[bytes, float]]


class AnswerDecoder:
    """Decodes one choice of a completion, item by item, until it has a `finish_reason`.

    The reason is "length" at the token limit, and "stop" at an end-of-sequence token or a stop string. Text
    after a stop string is cut off, and the stop string itself, too, unless `keeps_stop`.
    """

    __slots__ = (
        "_detokenizer",
        "_most_tokens",
        "_moved_count",
        "_reasoning",
        "_stops",
        "_token_bytes",
        "_top_count",
        "cached_tokens",
        "finish_reason",
        "logprobs",
        "prompt_token_count",
        "token_count",
        "token_ids",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str],
        *,
        keeps_stop: bool = False,
        keeps_tokens: bool = False,
        most_tokens: int = _MOST_TOKENS,
        token_bytes: Callable[[int], bytes] | None = None,
        top_count: int = 0,
        reasoning: ReasoningTokens | None = None,
    ) -> None:
        """An answer of more than `most_tokens` is none of the model.

        With `token_bytes`, which returns the text of one token, `logprobs` are kept, and those of up to
        `top_count` of the likeliest tokens. `reasoning` counts the tokens of the reasoning; None: they are
        not told apart.
        """
        self._reasoning = reasoning
        self._token_bytes = token_bytes
        self._top_count = top_count
        self.logprobs: list[TokenLogprob] = []
        """Those that have arrived, until they are taken away."""
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops, keeps_found=keeps_stop) if stops else None
        self.finish_reason: str | None = None
        self.token_count = 0
        self.token_ids: list[int] | None = [] if keeps_tokens else None
        """The tokens so far, if they are kept."""
        self._most_tokens = most_tokens
        self._moved_count = 0
        self.prompt_token_count: int | None = None
        """As counted by the engine; None if it did not count."""
        self.cached_tokens: int | None = None

    held: Sequence[Any] = ()
    """The part of an item that `feed` has left, so that other requests have their turn; not empty only for
    embeddings."""

    def feed_held(self) -> str:
        """Return the text of the next part of what is held. Raises PlaneError."""
        return ""

    @property
    def keeps_logprobs(self) -> bool:
        """True if `logprobs` are kept."""
        return self._token_bytes is not None

    @property
    def reasoning_count(self) -> int | None:
        """The tokens of the reasoning so far; None if they are not told apart."""
        return None if self._reasoning is None else min(self._reasoning.count, self.token_count)

    def feed(self, item: Any) -> str:
        """Return the text that an item of the worker's answer (a GenerateItem) completes.

        Raises PlaneError.
        """
        if not isinstance(item, dict):
            raise ProtocolViolation(f"the worker answered with {type(item).__name__}, not with tokens")
        token_ids = item.get("token_ids") or ()
        if type(token_ids) not in _LISTS or self.token_count + len(token_ids) > self._most_tokens:
            raise ProtocolViolation(
                f"the worker's 'token_ids' are no list, or the answer has over {self._most_tokens} tokens"
            )
        self.token_count += len(token_ids)
        try:
            text = self._detokenizer.feed(token_ids)
            if self.token_ids is not None:
                self.token_ids.extend(token_ids)
            if self._reasoning is not None:
                self._reasoning.feed(token_ids)
        except (TypeError, ValueError, OverflowError) as exc:
            raise ProtocolViolation(
                "the worker answered with 'token_ids' that are no token ids of its model"
            ) from exc
        if self._token_bytes is not None:
            self._take_logprobs(item, token_ids, self._token_bytes)
        if token_ids and len(item) == 1 and self._stops is None:
            return text
        if self.cached_tokens is None and is_count(cached := item.get("cached_tokens")):
            self.cached_tokens = cached
        reason = item.get("finish_reason") or None  # some engines send "" while there is no reason
        if reason is not None:
            text += self._detokenizer.finish()
            self._take_counts(item.get("completion_usage"))
        if reason is None and self._stops is None:
            return text
        return self._ended(text, reason)

    def _ended(self, text: str, reason: Any) -> str:
        """Return the text up to a stop string. Note the finish reason, if there is one. Raises PlaneError."""
        if self._stops is not None:
            text = self._stops.feed(text)
            if self._stops.found is not None:
                self.finish_reason = "stop"
                return text
            if reason is not None:
                text += self._stops.finish()
        if reason is not None:
            self.finish_reason = openai_reason(reason)
        return text

    def _take_logprobs(
        self, item: dict[str, Any], token_ids: Sequence[int], token_bytes: Callable[[int], bytes]
    ) -> None:
        """Take the log probabilities of an item. Raises InvalidRequest if there are none."""
        logprobs: Any = item.get("log_probs")
        if not token_ids:
            return
        if type(logprobs) not in _LISTS or len(logprobs) != len(token_ids):
            raise InvalidRequest("logprobs: the engine of this model returns no log probabilities")
        tops: Any = item.get("top_logprobs")
        if type(tops) not in _LISTS or len(tops) != len(token_ids):
            tops = [()] * len(token_ids)
        try:
            for token_id, logprob, top in zip(token_ids, logprobs, tops, strict=True):
                others = [(token_bytes(each["token_id"]), _finite(each["logprob"])) for each in top]
                self.logprobs.append(
                    TokenLogprob(token_bytes(token_id), _finite(logprob), others[: self._top_count])
                )
        except (TypeError, KeyError, ValueError, OverflowError) as exc:
            raise ProtocolViolation("the worker answered with 'top_logprobs' that are none") from exc

    def _take_counts(self, usage: Any) -> None:
        """Take the engine's counts, which may differ from the number of tokens received here."""
        if isinstance(usage, dict):
            prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
            if is_count(completion):
                self.token_count = self._moved_count + completion
            if is_count(prompt) and prompt > self._moved_count:
                self.prompt_token_count = prompt - self._moved_count

    def restart(self) -> None:
        """Forget all items: another worker answers from the beginning."""
        self.logprobs.clear()
        self._detokenizer.finish()
        if self._stops is not None:
            self._stops.finish()
        self.token_count, self.prompt_token_count, self.cached_tokens = 0, None, None
        self._moved_count = 0
        if self.token_ids is not None:
            self.token_ids = []
        if self._reasoning is not None:
            self._reasoning.restart()

    def note_move(self) -> None:
        """Note that the next items are of another worker, whose prompt includes the answer so far."""
        self._moved_count = self.token_count

    @property
    def stop_found(self) -> str | None:
        """The stop string that ended the answer; None if there was none."""
        return None if self._stops is None else self._stops.found

    @property
    def cut_off(self) -> bool:
        """True if a stop string ended the answer: the worker does not know that it is over."""
        return self._stops is not None and self._stops.found is not None

    def check_complete(self) -> None:
        """Raise ConnectionLost if the items have ended without a finish reason, EngineFailed if there were no
        tokens either."""
        if self.finish_reason is None and not self.token_count:
            raise EngineFailed("the worker ended its answer without a token and without a finish_reason")
        if self.finish_reason is None:
            raise ConnectionLost("the worker ended its answer before it was complete: no finish_reason")


class EchoingDecoder(AnswerDecoder):
    """Decodes an answer that begins with the text of its prompt."""

    __slots__ = ("_echo", "_is_first")

    def __init__(self, echo: str, *args: Any, **options: Any) -> None:
        """`echo` is the text of the prompt; the others are those of `AnswerDecoder`."""
        super().__init__(*args, **options)
        self._echo = echo
        self._is_first = True

    def feed(self, item: Any) -> str:
        """See `AnswerDecoder`."""
        text = super().feed(item)
        if not self._is_first:
            return text
        self._is_first = False
        return self._echo + text

    def restart(self) -> None:
        """See `AnswerDecoder`."""
        super().restart()
        self._is_first = True


def _finite(logprob: float) -> float:
    """Return a log probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


def openai_reason(reason: Any) -> str:
    """Return OpenAI's name of a finish reason. Unknown reasons are "stop"; errors are raised."""
    if reason in ("stop", "length", "content_filter"):
        return str(reason)
    if reason == "cancelled":
        raise RequestCancelled("the worker cancelled the request")
    if not isinstance(reason, str):
        raise ProtocolViolation(
            f"the worker ended its answer with a {type(reason).__name__} as finish_reason"
        )
    if reason.startswith("error"):
        raise HandlerFailed(f"the worker ended its answer with {reason[:_SHOWN_CHARS]!r}")
    return "stop"
