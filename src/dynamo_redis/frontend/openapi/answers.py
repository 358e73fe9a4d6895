"""The answers of the HTTP API, as types for its document. Further members are possible in each.

The answers are written by `frontend/forms` and the handlers of the routes; tests hold them to these types.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

# --------------------------------------------------------------------------- errors


class ErrorObject(TypedDict):
    """An error of OpenAI's APIs. `param` is the field of the body that caused it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """An error in OpenAI's form."""

    error: ErrorObject


class Fault(TypedDict):
    """An error of Anthropic's API."""

    type: str
    message: str
    details: NotRequired[dict[str, Any]]


class AnthropicErrorAnswer(TypedDict):
    """An error in Anthropic's form."""

    type: Literal["error"]
    error: Fault
    request_id: str


# --------------------------------------------------------------------------- generation


class Usage(TypedDict):
    """The counts of tokens of a completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[dict[str, int]]
    completion_tokens_details: NotRequired[dict[str, int]]


class Nvext(TypedDict):
    """The fields that `nvext.extra_fields` asks for."""

    worker_id: NotRequired[dict[str, int | None]]
    timing: NotRequired[dict[str, float]]
    stop_reason: NotRequired[str | None]


FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class CalledFunction(TypedDict):
    """The function that a model calls. `arguments` is JSON as a string."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(TypedDict):
    """The answer of a chat."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """One of the answers of a chat."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    nvext: NotRequired[Nvext]


class TextChoice(TypedDict):
    """One of the texts of a text completion."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class TextCompletion(TypedDict):
    """A text completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    nvext: NotRequired[Nvext]


class AnthropicUsage(TypedDict):
    """The counts of tokens of a message."""

    input_tokens: int
    output_tokens: int
    output_tokens_details: NotRequired[dict[str, int]]


class MessageAnswer(TypedDict):
    """A message in Anthropic's form."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str
    stop_sequence: str | None
    usage: AnthropicUsage


class ResponsesUsage(TypedDict):
    """The counts of tokens of a response."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseAnswer(TypedDict):
    """A response in OpenAI's newer form."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponsesUsage


# --------------------------------------------------------------------------- tokens


class EmbeddingUsage(TypedDict):
    """The counts of tokens of a request for embeddings."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingEntry(TypedDict):
    """The embedding of one input: numbers, or base64 of them as little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(TypedDict):
    """The embeddings of all inputs, in their order."""

    object: Literal["list"]
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingUsage


class TokenCount(TypedDict):
    """The number of tokens of a conversation."""

    input_tokens: int


class TokenizeAnswer(TypedDict):
    """The tokens of a text or a chat."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(TypedDict):
    """The text of tokens."""

    prompt: str


# --------------------------------------------------------------------------- models


class ModelEntry(TypedDict):
    """A model in OpenAI's form."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelListAnswer(TypedDict):
    """The models in OpenAI's form."""

    object: Literal["list"]
    data: list[ModelEntry]


class AnthropicModel(TypedDict):
    """A model in Anthropic's form."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: str
    max_input_tokens: int
    max_tokens: int


class AnthropicModelList(TypedDict):
    """The models in Anthropic's form."""

    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


# --------------------------------------------------------------------------- operators


class VersionAnswer(TypedDict):
    """The version of the package."""

    version: str


class LiveAnswer(TypedDict):
    """The process answers."""

    status: Literal["live"]


class HealthAnswer(TypedDict):
    """The models that can be served, and their instances."""

    status: Literal["healthy", "unhealthy"]
    models: list[dict[str, Any]]
    endpoints: list[str]
    instances: list[dict[str, Any]]
    registry: str
    registry_reason: NotRequired[str]
    hit_rate: NotRequired[float]
    reason: NotRequired[str]


class Thresholds(TypedDict):
    """The busy thresholds of a model; null: it has none."""

    model: str
    active_decode_blocks_threshold: float | None
    active_prefill_tokens_threshold: int | None
    active_prefill_tokens_threshold_frac: float | None


class ThresholdList(TypedDict):
    """The busy thresholds of all models."""

    thresholds: list[Thresholds]


class ClearedCaches(TypedDict):
    """The workers that have dropped their unused KV blocks, and those that have not."""

    cleared_workers: list[dict[str, Any]]
    failed_workers: list[dict[str, Any]]
    message: NotRequired[str]
