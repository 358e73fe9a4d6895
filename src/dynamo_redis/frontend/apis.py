"""The APIs whose requests go to workers: the path, body, response and errors of each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from dynamo_redis.frontend.anthropic_body import HIDES_THINKING, MessagesBody
from dynamo_redis.frontend.embedding_body import INPUT_NAMES, EmbeddingBody
from dynamo_redis.frontend.forms.base import ErrorForm, ResponseForm
from dynamo_redis.frontend.forms.chat import ChatForm
from dynamo_redis.frontend.forms.completions import OPENAI_ERRORS
from dynamo_redis.frontend.forms.embeddings import EmbeddingsForm
from dynamo_redis.frontend.forms.messages import ANTHROPIC_ERRORS, MessagesForm
from dynamo_redis.frontend.forms.responses import ResponsesForm
from dynamo_redis.frontend.forms.text import TextForm
from dynamo_redis.frontend.http.bodies import Body
from dynamo_redis.frontend.model_loading import LoadedModel
from dynamo_redis.frontend.observation import Kind
from dynamo_redis.frontend.openai import ChatBody, TextBody
from dynamo_redis.frontend.options import CompletionOptions, RequestBody
from dynamo_redis.frontend.responses_body import CHAT_NAMES, ResponsesBody

MESSAGES_PATH: Final = "/v1/messages"
COUNT_PATH: Final = MESSAGES_PATH + "/count_tokens"


@dataclass(frozen=True, slots=True)
class Api:
    """An API whose requests go to workers."""

    kind: Kind
    path: str
    body: type[RequestBody]
    form: Callable[[str, CompletionOptions, bytes], ResponseForm]
    """Makes the form of a response from the model's name, the options and the notes of the body."""
    errors: ErrorForm = OPENAI_ERRORS
    read: Callable[[list[bytearray]], Awaitable[Body]] | None = None
    """Reads a body that is no JSON, given in pieces, which may be released. Raises ApiError."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Its names of fields of a chat, for errors; those that are the same may be left out."""
    id_headers: tuple[bytes, ...] = (b"x-request-id",)
    """Headers of a response that have the request's id."""

    @property
    def renders(self) -> bool:
        """True if prompts are conversations, which a chat template renders."""
        return self.kind not in ("text", "embeddings")

    def can_serve(self, model: LoadedModel) -> bool:
        """Return whether a model takes requests of this API."""
        if self.kind == "embeddings":
            return model.embeds
        return model.template is not None if self.renders else model.completes_text


def errors_of(path: str) -> ErrorForm:
    """Return the form of the errors below a path."""
    return ANTHROPIC_ERRORS if path.startswith(MESSAGES_PATH) else OPENAI_ERRORS


APIS: Final = (
    Api("chat", "/v1/chat/completions", ChatBody, ChatForm.of),
    Api("text", "/v1/completions", TextBody, TextForm.of),
    Api(
        "messages",
        MESSAGES_PATH,
        MessagesBody,
        lambda model, body, notes: MessagesForm(
            model, wanted_tokens=body.wanted_tokens, hides_thinking=notes == HIDES_THINKING
        ),
        ANTHROPIC_ERRORS,
        id_headers=(b"x-request-id", b"request-id"),
    ),
    Api(
        "responses",
        "/v1/responses",
        ResponsesBody,
        lambda model, _, notes: ResponsesForm(model, notes),
        names=CHAT_NAMES,
    ),
    Api(
        "embeddings",
        "/v1/embeddings",
        EmbeddingBody,
        lambda model, *_: EmbeddingsForm(model),
        names=INPUT_NAMES,
    ),
)
