"""The bodies of OpenAI's chat and text completions, as far as they are served here.

Source: OpenAI's API reference, and for the fields it lacks (`ignore_eos`, `top_k`, `chat_template_kwargs`,
…) vLLM's and Dynamo's servers. Unknown fields are accepted and ignored. A field that asks for something this
server cannot do is refused, by name, rather than ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, WrapValidator
from typing_extensions import TypedDict

from dynamo_redis.frontend.http_errors import ApiError, invalid

MAX_CHOICES = 128
MAX_PROMPTS = 256
MAX_STOPS = 4
MAX_STOP_CHARS = 1024

_INT64 = {"ge": -(2**63), "le": 2**63 - 1}

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


# --------------------------------------------------------------------------- messages

_OPEN = ConfigDict(extra="allow", strict=True)


def _check_only(value: Any, check: Callable[[Any], Any]) -> Any:
    """Validate, but keep the input: validation orders the keys of a mapping anew, and templates see that."""
    check(value)
    return value


AsGiven = WrapValidator(_check_only)


def _by_type(**tags: str) -> Callable[[object], str | None]:
    """Chooses the member of a union by the type of the value, so that errors speak of that member alone."""

    def tag(value: object) -> str | None:
        return tags.get(type(value).__name__)

    return tag


class ContentPart(TypedDict):
    """One part of a message's content; only text can be served."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: Literal["text", "refusal"]
    text: NotRequired[str]
    refusal: NotRequired[str]


class CalledFunction(TypedDict):
    """The function of a tool call; `arguments` is JSON as a string (or, from some clients, an object)."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str


class ToolCall(TypedDict):
    """A call that the assistant made."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    function: CalledFunction


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[ContentPart], Tag("<parts>")]
    | Annotated[None, Tag("<none>")],
    Discriminator(
        _by_type(str="<text>", list="<parts>", NoneType="<none>"),
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of content parts",
    ),
]


class Message(TypedDict):
    """One message of a conversation. Keys beyond these reach the chat template as they are."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: NotRequired[Content]
    tool_calls: NotRequired[list[ToolCall] | None]


class Function(TypedDict):
    """A function that the model may call, described by a JSON schema."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str


class Tool(TypedDict):
    """A tool that the model may call."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    function: Function


# --------------------------------------------------------------------------- bodies


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = False


class Extensions(BaseModel):
    """`nvext`, Dynamo's extensions."""

    model_config = ConfigDict(strict=True)
    ignore_eos: bool | None = None


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    Annotated[StopString, Tag("<text>")]
    | Annotated[list[StopString], Field(max_length=MAX_STOPS), Tag("<list>")],
    Discriminator(
        _by_type(str="<text>", list="<list>"),
        custom_error_type="stop_type",
        custom_error_message="Input should be a string or a list of at most 4 strings",
    ),
]


class CompletionOptions(BaseModel):
    """What both kinds of completion share. Null is the same as absent."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    ignore_eos: bool | None = None
    nvext: Extensions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    seed: Annotated[int, Field(**_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    # Understood in order to be refused.
    logit_bias: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None

    def refuse_unsupported(self) -> None:
        """Raise ApiError for a field that asks for what cannot be served."""
        if self.logit_bias:
            raise _unsupported("logit_bias")
        if (self.response_format or {}).get("type", "text") != "text":
            raise _unsupported("response_format", "only plain text is generated")
        if self.stream_options is not None and not self.stream:
            raise invalid(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
            )

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens to generate, or None for what the context leaves."""
        return self.max_tokens

    @property
    def ignores_eos(self) -> bool:
        """Whether to generate past the end-of-sequence token."""
        return bool(self.ignore_eos or (self.nvext and self.nvext.ignore_eos))

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(CompletionOptions):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1), AsGiven]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[Tool], AsGiven] | None = None
    tool_choice: str | dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template: str | None = None
    audio: dict[str, Any] | None = None
    functions: list[Any] | None = None

    def refuse_unsupported(self) -> None:
        """See `CompletionOptions`."""
        super().refuse_unsupported()
        if self.logprobs or self.top_logprobs:
            raise _unsupported("logprobs" if self.logprobs else "top_logprobs")
        if self.chat_template is not None:
            raise _unsupported("chat_template", "the model's own template is used")
        if self.audio is not None:
            raise _unsupported("audio")
        if self.functions:
            raise _unsupported("functions", "use 'tools'")
        if self.tool_choice not in (None, "auto", "none"):
            raise _unsupported("tool_choice", "only 'auto' and 'none' can be served")
        if self.add_generation_prompt and self.continue_final_message:
            raise invalid(
                "'add_generation_prompt' and 'continue_final_message' exclude each other.",
                "continue_final_message",
            )
        for index, message in enumerate(self.messages):
            if message.get("content") is None and message["role"] != "assistant":
                raise invalid(
                    f"Missing content of a message whose role is {message['role']!r}.",
                    f"messages[{index}].content",
                )

    @property
    def wanted_tokens(self) -> int | None:
        """See `CompletionOptions`; the newer name wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def _prompt_tag(value: object) -> str | None:
    if isinstance(value, list):
        first = type(value[0]).__name__ if value else ""
        return {"str": "<texts>", "int": "<ids>", "list": "<id lists>"}.get(first)
    return "<text>" if isinstance(value, str) else None


TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS), Tag("<id lists>")],
    Discriminator(
        _prompt_tag,
        custom_error_type="prompt_type",
        custom_error_message=(
            "Input should be a string, a list of strings, a list of token ids, or a list of lists of them"
        ),
    ),
]


class TextBody(CompletionOptions):
    """`POST /v1/completions`."""

    prompt: Prompt
    add_special_tokens: bool | None = True
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def refuse_unsupported(self) -> None:
        """See `CompletionOptions`."""
        super().refuse_unsupported()
        if self.logprobs is not None:
            raise _unsupported("logprobs")
        if self.echo:
            raise _unsupported("echo")
        if self.suffix:
            raise _unsupported("suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _unsupported("best_of", "it must be equal to 'n'")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


def _unsupported(field: str, reason: str = "it is not supported by this server") -> ApiError:
    return invalid(f"Unsupported parameter: '{field}': {reason}.", field, "unsupported_parameter")


# --------------------------------------------------------------------------- reading a body

B = TypeVar("B", bound=CompletionOptions)

_NO_FIELD = re.compile(r"<.*>|\[key\]")


def read_body(kind: type[B], content: bytes) -> B:
    """Check a body. Raises ApiError 400, whose `param` names the field: `messages[0].content`."""
    try:
        body = kind.model_validate_json(content)
    except ValidationError as exc:
        raise _explain(exc) from exc
    body.refuse_unsupported()
    return body


def _explain(exc: ValidationError) -> ApiError:
    error = exc.errors(include_url=False, include_input=False)[0]
    param = ""
    for part in error["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif not _NO_FIELD.fullmatch(part):
            param += f".{part}" if param else part
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "json_invalid":
        return invalid(f"The request body is not valid JSON: {_json_reason(error)}.", code="invalid_json")
    if not param:
        return invalid(f"The request body is not a JSON object: {reason}.")
    if error["type"] == "missing":
        return invalid(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    return invalid(f"Invalid value for '{param}': {reason}.", param, "invalid_value")


def _json_reason(error: Any) -> str:
    return str(error.get("ctx", {}).get("error") or error["msg"])
