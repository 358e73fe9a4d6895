"""The form of OpenAI's embeddings, which are always sent whole."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_redis.frontend.choices import CompletionChoice, Usage
from dynamo_redis.frontend.forms.base import ChoiceEncoder, ErrorForm
from dynamo_redis.frontend.forms.completions import OPENAI_ERRORS
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.http.sse import unicode_json


class EmbeddingsForm:
    """A list of embeddings."""

    errors: ErrorForm = OPENAI_ERRORS

    def __init__(self, model: str) -> None:
        self.model = model

    def whole(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes:
        """See `ResponseForm`. There is one choice, whose parts are the entries of `data`."""
        entries = ",".join(filter(None, map(str, choices[0].parts)))
        count = usage.prompt_count
        rest = unicode_json({"model": self.model, "usage": {"prompt_tokens": count, "total_tokens": count}})
        return f'{{"object":"list","data":[{entries}],{rest[1:]}'.encode(errors="replace")

    def encoder(self, choice: CompletionChoice) -> ChoiceEncoder:
        """Not called: no body asks for a stream."""
        raise NotImplementedError

    def end(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes:
        """Not called: no body asks for a stream."""
        raise NotImplementedError

    def failure(self, error: ApiError, request_id: str) -> bytes:
        """Not called: no body asks for a stream."""
        raise NotImplementedError
