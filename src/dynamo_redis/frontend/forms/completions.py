"""The form that OpenAI's chat and text completions share: choices, a frame around each, usage, errors."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Final, Self

from dynamo_redis.frontend.choices import CompletionChoice, Usage
from dynamo_redis.frontend.forms.base import ChoiceEncoder, ErrorForm
from dynamo_redis.frontend.forms.detailed import DetailedEncoder, Logprobs
from dynamo_redis.frontend.forms.extra_fields import ExtraFields
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.http.sse import DONE, ascii_json, escape, event, unicode_json
from dynamo_redis.frontend.options import CompletionOptions

AFTER_REASON: Final = b',"logprobs":null}]}\n\n'


class OpenAiErrors:
    """Errors in OpenAI's form: `{"error": {…}}`."""

    def response(self, error: ApiError, request_id: str) -> tuple[int, bytes]:
        """See `ErrorForm`."""
        return error.status, error.body_bytes()


OPENAI_ERRORS: Final[ErrorForm] = OpenAiErrors()


class CompletionForm(ABC):
    """The form of a completion. Subclasses say how a choice looks."""

    id_prefix: ClassVar[str]
    object_name: ClassVar[str]
    chunk_name: ClassVar[str]
    errors: ErrorForm = OPENAI_ERRORS

    def __init__(self, model: str, *, includes_usage: bool, counts_continuously: bool = False) -> None:
        """`includes_usage`: a stream ends with a chunk that counts tokens; `counts_continuously`: each one
        does."""
        self._counts_continuously = counts_continuously
        self.model = model
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._includes_usage = includes_usage
        self._chunk_frame = self._frame(self.chunk_name)
        self.extra: ExtraFields | None = None
        """The fields that are told beside OpenAI's; None: there are none."""

    @classmethod
    def of(cls, model: str, options: CompletionOptions, _: bytes = b"") -> Self:
        """Make the form of a response by a model as its options say."""
        return cls(
            model,
            includes_usage=options.includes_usage,
            counts_continuously=options.counts_continuously,
        )

    def _frame(self, object_name: str) -> dict[str, Any]:
        return {"id": self._id, "object": object_name, "created": self._created, "model": self.model}

    def detailed(self, encoder: ChoiceEncoder, choice: CompletionChoice, logprobs: Logprobs) -> ChoiceEncoder:
        """Return the encoder of a choice, whose chunks are completed if the request asks for more than
        text."""
        index = choice.index
        if not choice.answer.keeps_logprobs and not self._counts_continuously:
            return encoder

        def start() -> bytes:
            if not self._counts_continuously:
                return self.chunk_start(index)
            return self.chunk_start(index, openai_usage(Usage.of([choice])))

        return DetailedEncoder(encoder, choice, self.chunk_start(index), start, logprobs)

    def chunk_start(self, index: int, counts: dict[str, Any] | None = None) -> bytes:
        """Return the start of a choice's chunks, which is constant but for the counts of tokens so far."""
        fields = unicode_json(self._chunk_frame)[1:-1]
        usage = f'"usage":{ascii_json(counts)},' if self._includes_usage else ""
        start = f'data: {{{fields},{usage}"choices":[{{"index":{index},'
        return start.encode(errors="replace")

    @abstractmethod
    def content(self, choice: CompletionChoice) -> dict[str, Any]:
        """Return the fields of a whole choice that hold its answer."""

    @abstractmethod
    def logprobs(self, choice: CompletionChoice) -> dict[str, Any]:
        """Return the log probabilities of a whole answer."""

    def whole(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes:
        """See `ResponseForm`."""
        completion = {
            **self._frame(self.object_name),
            "choices": [
                {
                    "index": choice.index,
                    **self.content(choice),
                    "logprobs": self.logprobs(choice) if choice.answer.keeps_logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for choice in choices
            ],
            "usage": openai_usage(usage),
            **self._nvext(choices, usage),
        }
        return json.dumps(completion, ensure_ascii=False).encode(errors="replace")

    def end(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes:
        """See `ResponseForm`."""
        further: dict[str, Any] = {"usage": openai_usage(usage)} if self._includes_usage else {}
        further |= self._nvext(choices, usage)
        return event({**self._chunk_frame, "choices": [], **further}) + DONE if further else DONE

    def _nvext(self, choices: Sequence[CompletionChoice], usage: Usage) -> dict[str, Any]:
        return {} if self.extra is None else {"nvext": self.extra.of(choices, usage)}

    def failure(self, error: ApiError, request_id: str) -> bytes:
        """See `ResponseForm`."""
        return event(error.body())


class ChunkEncoder:
    """Encodes the chunks of one choice.

    The frame around a text is made once. A chunk is then two concatenations and an escape: 0.2 µs, against
    20 µs for serializing a model of it.
    """

    __slots__ = ("_after", "_before", "_end", "_start")

    def __init__(self, start: bytes, before: bytes, after: bytes, end: bytes) -> None:
        """A text's chunk is `start`, `before`, the text as a JSON string, and `after`. In the last one, `end`
        is before the finish reason."""
        self._start = start
        self._before = start + before
        self._after = after
        self._end = end

    def texts(self, texts: Sequence[str]) -> bytes:
        """Return the chunks of pieces of text."""
        before, after = self._before, self._after
        if len(texts) == 1:
            return before + escape(texts[0]) + after
        return b"".join([before + escape(text) + after for text in texts])

    def end(self, finish_reason: str) -> bytes:
        """Return the choice's last chunk, with the finish reason."""
        return self._start + self._end + escape(finish_reason) + AFTER_REASON


def openai_usage(usage: Usage) -> dict[str, Any]:
    """Return the counts of tokens under the names of OpenAI's completions."""
    counts: dict[str, Any] = {
        "prompt_tokens": usage.prompt_count,
        "completion_tokens": usage.answer_count,
        "total_tokens": usage.prompt_count + usage.answer_count,
    }
    if usage.cached_count is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": usage.cached_count}
    if usage.reasoning_count is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_count}
    return counts
