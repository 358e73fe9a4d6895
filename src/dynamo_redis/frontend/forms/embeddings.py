"""The form of OpenAI's embeddings, which are always sent whole."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dynamo_redis.frontend.choices import CompletionChoice, Usage
from dynamo_redis.frontend.forms.base import ChoiceEncoder, ErrorForm
from dynamo_redis.frontend.forms.completions import OPENAI_ERRORS
from dynamo_redis.frontend.http.errors import ApiError


class EmbeddingsForm:
    """A list of embeddings."""

    errors: ErrorForm = OPENAI_ERRORS

    def __init__(self, model: str) -> None:
        self.model = model

    def whole(self, choices: Sequence[CompletionChoice], usage: Usage) -> list[str]:
        """See `ResponseForm`. There is one choice, whose parts are the entries of `data`."""
        pieces = ['{"object":"list","data":[']
        for entries in filter(None, map(str, choices[0].parts)):
            pieces += (entries, ",")
        count = usage.prompt_count
        rest = {"model": self.model, "usage": {"prompt_tokens": count, "total_tokens": count}}
        pieces[-1] = "]," if len(pieces) > 1 else pieces[-1] + "],"
        return [*pieces, json.dumps(rest)[1:]]

    def encoder(self, choice: CompletionChoice) -> ChoiceEncoder:
        """Not called: no body asks for a stream."""
        raise NotImplementedError

    def end(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes:
        """Not called: no body asks for a stream."""
        raise NotImplementedError

    def failure(self, error: ApiError, request_id: str) -> bytes:
        """Not called: no body asks for a stream."""
        raise NotImplementedError
