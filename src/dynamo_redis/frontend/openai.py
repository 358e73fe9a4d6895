"""The bodies of OpenAI's chat and text completions, with the fields that are served here.

Source: OpenAI's API reference, and for the fields it lacks (`ignore_eos`, `top_k`, `chat_template_kwargs`,
…) vLLM's, SGLang's and Dynamo's servers. Other parameters are refused by name, or ignored if they change no
answer: see `parameters.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WrapValidator,
)
from typing_extensions import TypedDict

from dynamo_redis.frontend import parameters
from dynamo_redis.frontend.http.errors import ApiError, invalid
from dynamo_redis.frontend.media import MODALITY_OF, PART_ROLES, parts_of
from dynamo_redis.frontend.options import (
    MAX_LOGPROBS,
    CheckedBody,
    CompletionOptions,
    TokenId,
    by_type,
    twice,
)
from dynamo_redis.frontend.parameters import unsupported
from dynamo_redis.frontend.tool_choice import check_tool_choice, guided_calls
from dynamo_redis.models.llm_protocol import SamplingOptions

MAX_PROMPTS = 256


# --------------------------------------------------------------------------- messages

_OPEN = ConfigDict(extra="allow", strict=True)


def _check_only(value: Any, check: Callable[[Any], Any]) -> Any:
    """Validate, but keep the input: validation reorders the keys of a mapping, which templates can see."""
    check(value)
    return value


AsGiven = WrapValidator(_check_only)


class TextPart(TypedDict):
    """A text as one part of a message's content. Its check names all types: other parts have their own."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: Literal["text", "refusal", "image_url", "input_audio", "audio_url", "video_url"]
    text: NotRequired[str]
    refusal: NotRequired[str]


def _check_address(url: str) -> str:
    # An engine may read its own files by `file:` URLs.
    if not url[:8].lower().startswith(("http://", "https://", "data:")):
        raise ValueError("Input should be an http, https or data URL")
    return url


MediaAddress = Annotated[str, AfterValidator(_check_address)]


class MediaUrl(TypedDict):
    """The address of an image, a sound or a video, or its content as a data URL."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    url: MediaAddress


class AudioData(TypedDict):
    """A sound, in base64."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    data: Annotated[str, Field(min_length=1)]
    format: str


class ImagePart(TypedDict):
    """An image."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: Literal["image_url"]
    image_url: MediaUrl


class AudioPart(TypedDict):
    """A sound with its content."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: Literal["input_audio"]
    input_audio: AudioData


class AudioUrlPart(TypedDict):
    """A sound by its address."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: Literal["audio_url"]
    audio_url: MediaUrl


class VideoPart(TypedDict):
    """A video."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: Literal["video_url"]
    video_url: MediaUrl


def _part_tag(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if isinstance(kind, str) and kind in MODALITY_OF else "<text>"


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[AudioPart, Tag("<input_audio>")]
    | Annotated[AudioUrlPart, Tag("<audio_url>")]
    | Annotated[VideoPart, Tag("<video_url>")],
    Discriminator(_part_tag),
]


class CalledFunction(TypedDict):
    """The function of a tool call; `arguments` is JSON as a string (or, from some clients, an object)."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str


class ToolCall(TypedDict):
    """A tool call of the assistant."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    function: CalledFunction


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[ContentPart], Field(fail_fast=True), Tag("<parts>")]
    | Annotated[None, Tag("<none>")],
    Discriminator(
        by_type(str="<text>", list="<parts>", NoneType="<none>"),
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of content parts",
    ),
]


class Message(TypedDict):
    """One message of a conversation. Other keys are passed to the chat template."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: NotRequired[Content]
    tool_calls: NotRequired[Annotated[list[ToolCall], Field(fail_fast=True)] | None]


class Function(TypedDict):
    """A function that the model may call, described by a JSON schema."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str


class Tool(TypedDict):
    """A tool that the model may call."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    function: Function


# --------------------------------------------------------------------------- bodies


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_NO_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True), AsGiven]
Tools = Annotated[list[Tool], Field(fail_fast=True), AsGiven]


class ChatBody(CompletionOptions):
    """`POST /v1/chat/completions`."""

    tag = b"c"
    further_parameters = parameters.CHAT

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    separate_reasoning: bool | None = None
    reasoning_effort: Effort | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def refuse_unsupported(self) -> None:
        """See `CompletionOptions`."""
        check_tool_choice(self.tool_choice, self.tools)
        super().refuse_unsupported()
        if self.top_logprobs and not self.logprobs:
            raise invalid("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        variables = self.chat_template_kwargs or {}
        for name in _NO_VARIABLES:
            if name in variables:
                raise invalid(f"'{name}' is a field of its own.", f"chat_template_kwargs.{name}")
        if self.reasoning_effort is not None and "reasoning_effort" in variables:
            raise twice("reasoning_effort", "chat_template_kwargs.reasoning_effort")
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
            if message["role"] not in PART_ROLES:
                _check_text_only(index, message)

    def media_places(self) -> dict[str, str]:
        """See `RequestBody`."""
        places: dict[str, str] = {}
        for number, message in enumerate(self.messages):
            for index, part in enumerate(parts_of(message)):
                if modality := MODALITY_OF.get(part["type"]):
                    places.setdefault(modality, f"messages[{number}].content[{index}].type")
        return places

    def _read_sampling(self) -> SamplingOptions:
        """See `CompletionOptions`. A tool that has to be called is a form of the answer."""
        options = super()._read_sampling()
        guided = guided_calls(self.tool_choice, self.tools, one=self.parallel_tool_calls is False)
        if guided is not None:
            if "guided_decoding" in options:
                raise invalid("An answer that has to call a tool has no other form.", "tool_choice")
            options["guided_decoding"] = guided
        return options

    @property
    def wanted_tokens(self) -> int | None:
        """See `CompletionOptions`; the newer name wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """See `CompletionOptions`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def template_variables(self) -> dict[str, Any]:
        """Return the chat template's variables besides messages, tools and documents.

        `reasoning_effort` is a variable as in vLLM. It also sets `enable_thinking`, to false for `none`,
        unless the client gives that variable.
        """
        variables = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
            variables.setdefault("enable_thinking", self.reasoning_effort != "none")
        return variables


def _check_text_only(number: int, message: Message) -> None:
    for index, part in enumerate(parts_of(message)):
        if part["type"] in MODALITY_OF:
            raise invalid(
                f"Messages whose role is {message['role']!r} have text alone.",
                f"messages[{number}].content[{index}].type",
                "invalid_value",
            )


def prompt_tag(value: object) -> str | None:
    """Choose the form of a prompt by its first value."""
    if isinstance(value, list):
        first = type(value[0]).__name__ if value else ""
        return {"str": "<texts>", "int": "<ids>", "list": "<id lists>"}.get(first)
    return "<text>" if isinstance(value, str) else None


TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("<id lists>")],
    Discriminator(
        prompt_tag,
        custom_error_type="prompt_type",
        custom_error_message=(
            "Input should be a string, a list of strings, a list of token ids, or a list of lists of them"
        ),
    ),
]


def _none_if_false(value: object) -> object:
    return None if value is False else value


class TextBody(CompletionOptions):
    """`POST /v1/completions`."""

    tag = b"t"
    further_parameters = parameters.TEXT

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(_none_if_false)] | None = None
    echo: bool | None = None

    def refuse_unsupported(self) -> None:
        """See `CompletionOptions`."""
        super().refuse_unsupported()
        if self.extra_fields and len(self.prompts) > 1:
            raise unsupported("nvext.extra_fields", "they are those of one choice")
        if self.echo and self.logprobs is not None:
            raise unsupported("echo", "with 'logprobs' it needs those of the prompt, which are not returned")

    @property
    def wanted_logprobs(self) -> int | None:
        """See `CompletionOptions`."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """See `CompletionOptions`."""
        return bool(self.echo)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


# --------------------------------------------------------------------------- reading a body

B = TypeVar("B", bound=CheckedBody)

_LONGEST_PART = 64
_NO_FIELD = re.compile(r"<.*>|\[key\]")


def read_body(kind: type[B], content: bytes | bytearray) -> B:
    """Check a body. Raises ApiError 400, whose `param` names the field: `messages[0].content`."""
    try:
        body = kind.model_validate_json(content)
    except ValidationError as exc:
        raise _refusal(exc) from exc
    body.refuse_unsupported()
    return body


def chat_body(fields: Mapping[str, Any], names: Mapping[str, str]) -> ChatBody:
    """Make the body of a chat from the fields of another API. Raises ApiError.

    `names` are the other API's names of the fields, for errors. Those do not name a place in the messages,
    since that API divides a conversation in another way.
    """
    try:
        body = ChatBody.model_validate({name: value for name, value in fields.items() if value is not None})
        body.refuse_unsupported()
    except ValidationError as exc:
        raise _without_place(_refusal(exc)).renamed(names) from exc
    except ApiError as exc:
        raise _without_place(exc).renamed(names) from None
    return body


def _without_place(error: ApiError) -> ApiError:
    if error.param is not None and error.param.startswith("messages["):
        error.message = error.message.replace(error.param, "messages")
        error.param = "messages"
    return error


def _refusal(exc: ValidationError) -> ApiError:
    error = exc.errors(include_url=False, include_input=False)[0]
    param = ""
    for part in error["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif not _NO_FIELD.fullmatch(part):
            part = part if len(part) <= _LONGEST_PART else part[:_LONGEST_PART] + "…"
            param += f".{part}" if param else part
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "json_invalid":
        reason = str(error.get("ctx", {}).get("error") or error["msg"])
        return invalid(f"The request body is not valid JSON: {reason}.", code="invalid_json")
    if not param:
        return invalid(f"The request body is not a JSON object: {reason}.")
    if error["type"] == "missing":
        return invalid(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    return invalid(f"Invalid value for '{param}': {reason}.", param, "invalid_value")
