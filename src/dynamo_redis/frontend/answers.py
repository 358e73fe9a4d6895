"""One answer in the making: a worker's items in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamo_redis.errors import ConnectionLost, HandlerFailed, ProtocolViolation, RequestCancelled
from dynamo_redis.frontend.tokens import Detokenizer, StopStrings
from dynamo_redis.models.llm_protocol import is_count


class Answer:
    """Follows one choice of a completion, item by item, until it has a `finish_reason`.

    That is "length" if the worker ran into the token limit, else "stop": an end-of-sequence token, or one
    of the stop strings. What follows that is cut off, and with it the stop string, unless it is kept.
    """

    __slots__ = (
        "_detokenizer",
        "_stops",
        "cached_tokens",
        "finish_reason",
        "prompt_token_count",
        "token_count",
    )

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], *, keeps_stop: bool = False) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops, keeps_found=keeps_stop) if stops else None
        self.finish_reason: str | None = None
        self.token_count = 0
        self.prompt_token_count: int | None = None
        """As the engine counted, if it did."""
        self.cached_tokens: int | None = None

    def feed(self, item: Any) -> str:
        """The text that an item of the worker's answer (a GenerateItem) completes. Raises PlaneError."""
        if not isinstance(item, dict):
            raise ProtocolViolation(f"the worker answered with {type(item).__name__}, not with tokens")
        token_ids = item.get("token_ids") or ()
        try:
            self.token_count += len(token_ids)
            text = self._detokenizer.feed(token_ids)
        except (TypeError, OverflowError) as exc:
            raise ProtocolViolation("the worker answered with 'token_ids' that are no token ids") from exc
        if self.cached_tokens is None and is_count(cached := item.get("cached_tokens")):
            self.cached_tokens = cached
        reason = item.get("finish_reason") or None  # engines write "" while there is none
        if reason is not None:
            text += self._detokenizer.finish()
            self._take_counts(item.get("completion_usage"))
        if self._stops is not None:
            text = self._stops.feed(text)
            if self._stops.found is not None:
                self.finish_reason = "stop"
                return text
            if reason is not None:
                text += self._stops.finish()
        if reason is not None:
            self.finish_reason = _reason(reason)
        return text

    def _take_counts(self, usage: Any) -> None:
        """Take what the engine counted: it may not be what the tokens sent here make."""
        if not isinstance(usage, dict):
            return
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if is_count(completion):
            self.token_count = completion
        if is_count(prompt) and prompt > 0:
            self.prompt_token_count = prompt

    def restart(self) -> None:
        """Forget what has come: another worker answers from the beginning."""
        self._detokenizer.finish()
        if self._stops is not None:
            self._stops.finish()
        self.token_count, self.prompt_token_count, self.cached_tokens = 0, None, None

    @property
    def cut_off(self) -> bool:
        """Whether a stop string ended the answer, so that the worker does not know that it is over."""
        return self._stops is not None and self._stops.found is not None

    def check_complete(self) -> None:
        """To be called when the items have ended. Raises ConnectionLost unless the answer has."""
        if self.finish_reason is None:
            raise ConnectionLost("the worker ended its answer before it was complete: no finish_reason")


def _reason(reason: Any) -> str:
    """The reason in OpenAI's words. An end that a worker calls otherwise is an end all the same."""
    if reason in ("stop", "length", "content_filter"):
        return str(reason)
    if reason == "cancelled":
        raise RequestCancelled("the worker cancelled the request")
    if not isinstance(reason, str) or reason.startswith("error"):
        raise HandlerFailed(f"the worker ended its answer with {reason!r}")
    return "stop"
