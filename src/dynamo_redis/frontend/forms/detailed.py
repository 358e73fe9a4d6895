"""Chunks with more than text: log probabilities, and the counts of tokens so far.

Few requests ask for these. So the encoders of texts know nothing of them, and their chunks are completed
here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from dynamo_redis.frontend.answers import TokenLogprob
from dynamo_redis.frontend.choices import CompletionChoice, Part
from dynamo_redis.frontend.forms.base import ChoiceEncoder
from dynamo_redis.frontend.http.sse import ascii_json

_NO_LOGPROBS: Final = b'"logprobs":null}]}'

Logprobs = Callable[[Sequence[TokenLogprob]], dict[str, Any]]
"""Writes log probabilities in an API's form."""


class DetailedEncoder:
    """Completes the chunks of another encoder."""

    def __init__(
        self,
        inner: ChoiceEncoder,
        choice: CompletionChoice,
        plain_start: bytes,
        start: Callable[[], bytes],
        logprobs: Logprobs,
    ) -> None:
        """`plain_start` is the start of the other encoder's chunks, in whose place stands what `start`
        returns."""
        self._inner = inner
        self._choice = choice
        self._plain_start = plain_start
        self._start = start
        self._logprobs = logprobs

    def begin(self) -> bytes:
        """See `ChoiceEncoder`."""
        return self._completed(self._inner.begin(), None)

    def parts(self, parts: Sequence[Part]) -> bytes:
        """See `ChoiceEncoder`. Texts that came together are one chunk, with the log probabilities of its
        tokens."""
        if not parts:
            return b""
        if all(isinstance(part, str) for part in parts):
            parts = ["".join(parts)]  # type: ignore[arg-type]
        return self._completed(self._inner.parts(parts), self._taken())

    def end(self, finish_reason: str) -> bytes:
        """See `ChoiceEncoder`."""
        return self._completed(self._inner.end(finish_reason), self._taken())

    def _taken(self) -> list[TokenLogprob] | None:
        """Return the log probabilities that are in no chunk yet."""
        answer = self._choice.answer
        if not answer.logprobs:
            return None
        taken, answer.logprobs = answer.logprobs, []
        return taken

    def _completed(self, events: bytes, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        start, completed = self._start(), []
        for each in events.split(b"\n\n")[:-1]:
            rest = each[len(self._plain_start) :]
            if logprobs is not None:
                written = ascii_json(self._logprobs(logprobs)).encode()
                rest = rest.removesuffix(_NO_LOGPROBS) + b'"logprobs":' + written + b"}]}"
                logprobs = None
            completed.append(start + rest + b"\n\n")
        return b"".join(completed)


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return log probabilities in the form of OpenAI's chats."""
    content = [
        {**_token(each.token, each.logprob), "top_logprobs": [_token(*other) for other in each.top]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}


class TextLogprobs:
    """Log probabilities in the form of OpenAI's text completions, of one choice."""

    def __init__(self) -> None:
        self._offset = 0

    def __call__(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the next ones. A token's offset is the length of the tokens' texts before it."""
        tokens = [each.token.decode(errors="replace") for each in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [
                {token.decode(errors="replace"): logprob for token, logprob in reversed(each.top)}
                for each in logprobs
            ],
            "text_offset": offsets,
        }
