"""The APIs that generate: the path, body, response and errors of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dynamo_redis.frontend.forms.base import ErrorForm, ResponseForm
from dynamo_redis.frontend.forms.chat import ChatForm
from dynamo_redis.frontend.forms.completions import OPENAI_ERRORS
from dynamo_redis.frontend.forms.text import TextForm
from dynamo_redis.frontend.http.bodies import Body
from dynamo_redis.frontend.observation import Kind
from dynamo_redis.frontend.openai import ChatBody, TextBody
from dynamo_redis.frontend.options import CompletionOptions


@dataclass(frozen=True, slots=True)
class Api:
    """An API that generates."""

    kind: Kind
    path: str
    body: type[CompletionOptions]
    form: Callable[[str, CompletionOptions], ResponseForm]
    """Makes the form of a response from the model's name and the options."""
    errors: ErrorForm = OPENAI_ERRORS
    read: Callable[[list[bytearray]], Body] | None = None
    """Reads a body that is no JSON, given in pieces. Raises ApiError."""

    @property
    def renders(self) -> bool:
        """True if prompts are conversations, which a chat template renders."""
        return self.kind != "text"


APIS: Final = (
    Api(
        "chat",
        "/v1/chat/completions",
        ChatBody,
        lambda model, body: ChatForm(model, includes_usage=body.includes_usage),
    ),
    Api(
        "text",
        "/v1/completions",
        TextBody,
        lambda model, body: TextForm(model, includes_usage=body.includes_usage),
    ),
)
