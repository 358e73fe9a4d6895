"""The operations of the HTTP API for its document: the bodies, answers and errors of each route.

A route that has no entry here cannot be described: a test holds the table to the routes of the application.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from dynamo_redis.frontend.anthropic_body import CountBody
from dynamo_redis.frontend.apis import APIS, COUNT_PATH, Api
from dynamo_redis.frontend.http.errors import ERROR_STATUSES
from dynamo_redis.frontend.observation import Kind
from dynamo_redis.frontend.openapi import answers
from dynamo_redis.frontend.tokenization import DetokenizeBody
from dynamo_redis.frontend.tokenize_body import TokenizeBody

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
_CLOSED: Final = ConfigDict(extra="forbid", strict=True)


class ThresholdChange(TypedDict, total=False):
    """The thresholds to set. Null, or a missing one, leaves a threshold as it is."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    active_decode_blocks_threshold: Annotated[float, Field(ge=0, le=1)] | None
    active_prefill_tokens_threshold: Annotated[int, Field(ge=0, lt=2**53)] | None
    active_prefill_tokens_threshold_frac: Annotated[float, Field(ge=0)] | None


class ThresholdsBody(ThresholdChange):
    """`POST /busy_threshold`."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    model: str


class NoParameters(TypedDict):
    """An empty object."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of a path."""

    name: str
    summary: str
    tag: str
    answers: Mapping[int, Mapping[str, Any]]
    """Status → media type → type of the content; None: any JSON, any text, or events."""
    body: Any = None
    """The type of the body; None: it takes none."""
    example: Any = None
    """An example of the body."""
    needs_body: bool = True
    errors: frozenset[int] = field(default_factory=frozenset)
    """The statuses of errors, besides those of overload and of a wrong key."""
    takes_place: bool = False
    """True if a request takes a place at the frontend: it may be refused because of overload."""


_BODY_ERRORS: Final = frozenset((400, 404, 413, 415))
_CHAT: Final = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}]}
_INPUT: Final = {"model": "demo", "input": "Hello!"}
_TEXT: Final = {"model": "demo", "prompt": "Once upon a time"}
_SUMMARIES: Final[Mapping[Kind, tuple[str, str, Any, Any]]] = {
    "chat": ("chat_completions", "A chat completion, whole or streamed", answers.ChatCompletion, _CHAT),
    "text": ("completions", "A text completion, whole or streamed", answers.TextCompletion, _TEXT),
    "messages": (
        "messages",
        "A message in Anthropic's form, whole or streamed",
        answers.MessageAnswer,
        {**_CHAT, "max_tokens": 100},
    ),
    "responses": (
        "responses",
        "An answer in OpenAI's newer form, whole or streamed; nothing is stored",
        answers.ResponseAnswer,
        _INPUT,
    ),
    "embeddings": ("embeddings", "The embeddings of texts", answers.EmbeddingList, _INPUT),
}


def _asks_workers(api: Api) -> Operation:
    name, summary, answer, example = _SUMMARIES[api.kind]
    streamed: dict[str, Any] = {} if api.kind == "embeddings" else {EVENTS: None}
    return Operation(
        name,
        summary,
        "clients",
        {200: {JSON: answer, **streamed}},
        api.body,
        example,
        errors=_BODY_ERRORS | ERROR_STATUSES,
        takes_place=True,
    )


def _tokenizes(name: str, summary: str, answer: Any, body: Any, example: Any) -> Operation:
    return Operation(
        name,
        summary,
        "clients",
        {200: {JSON: answer}},
        body,
        example,
        errors=_BODY_ERRORS | {502, 503, 504},
        takes_place=True,
    )


def _shows(name: str, summary: str, tag: str, media: str, answer: Any = None, *errors: int) -> Operation:
    return Operation(name, summary, tag, {200: {media: answer}}, errors=frozenset(errors))


OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    **{("POST", api.path): _asks_workers(api) for api in APIS},
    ("POST", COUNT_PATH): _tokenizes(
        "count_tokens", "The number of tokens of a conversation", answers.TokenCount, CountBody, _CHAT
    ),
    ("POST", "/tokenize"): _tokenizes(
        "tokenize", "The tokens of a text or a chat", answers.TokenizeAnswer, TokenizeBody, _TEXT
    ),
    ("POST", "/detokenize"): _tokenizes(
        "detokenize",
        "The text of tokens",
        answers.DetokenizeAnswer,
        DetokenizeBody,
        {"model": "demo", "tokens": [1, 2, 3]},
    ),
    ("GET", "/v1/models"): _shows(
        "list_models",
        "The models that are served now; in Anthropic's form with the header anthropic-version",
        "clients",
        JSON,
        answers.ModelListAnswer | answers.AnthropicModelList,
    ),
    ("GET", "/v1/models/{model}"): _shows(
        "retrieve_model",
        "One model; in Anthropic's form with the header anthropic-version",
        "clients",
        JSON,
        answers.ModelEntry | answers.AnthropicModel,
        404,
    ),
    ("GET", "/version"): _shows(
        "version", "The version of the package", "clients", JSON, answers.VersionAnswer
    ),
    ("GET", "/openapi.json"): _shows("openapi", "This document", "clients", JSON),
    ("GET", "/health"): Operation(
        "health",
        "200 while a model can be served, else 503",
        "operators",
        {status: {JSON: answers.HealthAnswer} for status in (200, 503)},
    ),
    ("GET", "/live"): _shows("live", "200 while the process answers", "operators", JSON, answers.LiveAnswer),
    ("GET", "/metrics"): _shows("metrics", "Prometheus's text format", "operators", "text/plain"),
    ("GET", "/busy_threshold"): _shows(
        "busy_thresholds",
        "The loads above which a model's workers are busy",
        "operators",
        JSON,
        answers.ThresholdList,
    ),
    ("POST", "/busy_threshold"): Operation(
        "set_busy_threshold",
        "Set the busy thresholds of a model",
        "operators",
        {200: {JSON: answers.Thresholds}},
        ThresholdsBody,
        {"model": "demo", "active_decode_blocks_threshold": 0.9},
        errors=_BODY_ERRORS | {403, 503},
    ),
    ("POST", "/clear_kv_blocks"): Operation(
        "clear_kv_blocks",
        "Have each worker drop the KV blocks that no running request uses",
        "operators",
        {
            200: {JSON: answers.ClearedCaches},
            502: {JSON: answers.ClearedCaches},
            503: {JSON: answers.ClearedCaches | answers.ErrorAnswer},
        },
        NoParameters,
        needs_body=False,
        errors=frozenset((400, 403, 413, 415)),
    ),
    ("GET", "/dashboard"): _shows("dashboard", "A live page for a browser", "operators", "text/html"),
    ("GET", "/dashboard/page.css"): _shows("dashboard_css", "Its styles", "operators", "text/css"),
    ("GET", "/dashboard/page.js"): _shows("dashboard_js", "Its program", "operators", "text/javascript"),
    ("GET", "/dashboard/events"): _shows(
        "dashboard_events", "The state that the page shows, as it changes", "operators", EVENTS, None, 503
    ),
}
"""The operations, by method and path."""
