"""The body of OpenAI's Responses, and its conversion to the body of a chat.

Nothing is stored: each request holds its whole conversation. Source: the types of OpenAI's own client, and of
Codex's. Parameters that are no fields here are refused by name, or change no answer: `RESPONSES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from dynamo_redis.frontend.http.errors import invalid
from dynamo_redis.frontend.http.sse import ascii_json
from dynamo_redis.frontend.openai import Effort, MediaAddress, chat_body
from dynamo_redis.frontend.options import CompletionOptions, RequestBody, by_type
from dynamo_redis.frontend.parameters import STREAM_OPTIONS, Parameters, Refusal, unsupported

_OPEN: Final = ConfigDict(extra="allow", strict=True)
"""Further keys of an item are ids and states of an earlier answer: no template reads them."""

_CLOSED: Final = ConfigDict(extra="forbid", strict=True)


# --------------------------------------------------------------------------- items


class TextPart(TypedDict):
    """A text. Its check names all types: an image has its own."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: Literal["input_text", "output_text", "refusal", "input_image"]
    text: NotRequired[str]
    refusal: NotRequired[str]


class ImagePart(TypedDict):
    """An image, by its address: no files are stored."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: Literal["input_image"]
    image_url: MediaAddress
    detail: NotRequired[str | None]


def _part_tag(value: object) -> str:
    return "<image>" if isinstance(value, dict) and value.get("type") == "input_image" else "<text>"


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image>")],
    Discriminator(_part_tag),
]
"""A part of a message or of a call's output."""

Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Field(fail_fast=True), Tag("<parts>")],
    Discriminator(
        by_type(str="<text>", list="<parts>"),
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of content parts",
    ),
]


class MessageItem(TypedDict):
    """A message. Its type may be left out."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: NotRequired[Literal["message"]]
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(TypedDict):
    """A call of a function, of an earlier answer."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(TypedDict):
    """The output of a call."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningText(TypedDict):
    """A part of a reasoning item."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    text: str


class ReasoningItem(TypedDict):
    """Reasoning of an earlier answer. What is encrypted, only its maker can read."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: Literal["reasoning"]
    summary: NotRequired[list[ReasoningText] | None]
    content: NotRequired[list[ReasoningText] | None]


_ITEM_TYPES: Final = ("message", "function_call", "function_call_output", "reasoning")


def _check_item_type(value: object) -> object:
    if isinstance(value, dict) and value.get("type", "message") not in _ITEM_TYPES:
        raise PydanticCustomError(
            "item_type",
            "there are items of type {types} here, not of type {type}",
            {"types": ", ".join(_ITEM_TYPES), "type": repr(value.get("type"))[:80]},
        )
    return value


def _item_tag(value: object) -> str | None:
    return f"<{value.get('type', 'message')}>" if isinstance(value, dict) else None


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[OutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(_item_tag, custom_error_type="item", custom_error_message="Input should be an item"),
    BeforeValidator(_check_item_type),
]

Input = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[Item], Field(min_length=1, fail_fast=True), Tag("<items>")],
    Discriminator(
        by_type(str="<text>", list="<items>"),
        custom_error_type="input_type",
        custom_error_message="Input should be a string or a list of items",
    ),
]


# --------------------------------------------------------------------------- the body


class Tool(TypedDict):
    """A function that the model may call."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: str
    name: NotRequired[str]
    description: NotRequired[str | None]
    parameters: NotRequired[dict[str, Any] | None]
    strict: NotRequired[bool | None]


class NamedTool(TypedDict):
    """`tool_choice`, as an object."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["function"]
    name: str


ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("<text>")] | Annotated[NamedTool, Tag("<object>")],
    Discriminator(
        by_type(str="<text>", dict="<object>"),
        custom_error_type="tool_choice",
        custom_error_message="Input should be 'auto', 'none', 'required' or a function",
    ),
]


class TextFormat(TypedDict):
    """`text.format`."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["text", "json_object", "json_schema"]
    name: NotRequired[str]
    description: NotRequired[str | None]
    schema: NotRequired[dict[str, Any]]
    strict: NotRequired[bool | None]


class TextOptions(TypedDict):
    """`text`."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    format: NotRequired[TextFormat | None]
    verbosity: NotRequired[Literal["low", "medium", "high"] | None]


class Reasoning(TypedDict):
    """`reasoning`. Reasoning is sent as it is, so a summary has no length of its own."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    effort: NotRequired[Effort | None]
    summary: NotRequired[Literal["auto", "concise", "detailed"] | None]
    generate_summary: NotRequired[Literal["auto", "concise", "detailed"] | None]


class ResponseStreamOptions(TypedDict):
    """`stream_options`."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    include_obfuscation: NotRequired[Annotated[bool, Field(json_schema_extra={"const": False})] | None]


_STATELESS: Final = "nothing is stored: send the whole conversation as 'input'"

RESPONSES: Final = Parameters(
    refused={
        "previous_response_id": Refusal(_STATELESS),
        "conversation": Refusal(_STATELESS),
        "prompt": Refusal("prompts are not stored here"),
        "background": Refusal("an answer is for the client that waits for it", (False,)),
        "background_options": Refusal("an answer is for the client that waits for it"),
        "context_management": Refusal("conversations are answered as sent", ([],)),
        "truncation": Refusal("a conversation that is too long is refused", ("disabled",)),
        "top_logprobs": Refusal("log probabilities are not returned", (0,)),
        "service_tier": Refusal("there is one tier", ("auto", "default")),
        "moderation": Refusal(),
        "image": Refusal("answers are text"),
        "access_programs": Refusal("it is a service of OpenAI's own servers"),
        "messages": Refusal("use 'input'"),
        "max_tokens": Refusal("use 'max_output_tokens'"),
        "max_completion_tokens": Refusal("use 'max_output_tokens'"),
        "response_format": Refusal("use 'text.format'"),
        "reasoning_effort": Refusal("use 'reasoning.effort'"),
    },
    harmless={
        "store": "nothing is stored, as the answer's 'store' says",
        "user": "names the end user",
        "safety_identifier": "names the end user",
        "client_metadata": "labels of the client's own",
        "prompt_cache_key": "the router finds cached prompts by their tokens",
        "prompt_cache_retention": "how long blocks stay is the engine's choice",
        "prompt_cache_options": "how long blocks stay is the engine's choice",
        "max_tool_calls": "bounds the tools of OpenAI's servers, and there are none",
    },
)

_TOOL: Final = Parameters(
    refused={
        "allowed_callers": Refusal("the model alone calls functions", (["direct"],)),
        "async": Refusal("a function's output is part of the next request", (False,)),
        "defer_loading": Refusal("each function is shown to the model", (False,)),
    },
    harmless={"output_schema": "describes what no template shows"},
)

_INCLUDED: Final = frozenset(
    (
        "reasoning.encrypted_content",  # reasoning is sent readable, and there is nothing to encrypt
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
        "message.input_image.image_url",
    )
)
"""Values of `include` that concern nothing an answer from here has."""

CHAT_NAMES: Final = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "tool_choice.function.name": "tool_choice.name",
}
"""The names that a chat's parameters have here."""


class ResponsesBody(RequestBody):
    """`POST /v1/responses`."""

    tag = b"r"
    further_parameters = RESPONSES

    model: str
    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None

    def refuse_unsupported(self) -> None:
        """See `CheckedBody`."""
        super().refuse_unsupported()
        for index, tool in enumerate(self.tools or ()):
            at = f"tools[{index}]"
            if tool["type"] != "function":
                raise unsupported(f"{at}.type", f"'{tool['type'][:80]}': only functions can be called")
            if not tool.get("name"):
                name = f"{at}.name"
                raise invalid(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
            further = {name: value for name, value in tool.items() if name not in Tool.__annotations__}
            _TOOL.check(further, Tool.__annotations__, f"{at}.")
        for wanted in self.include or ():
            if wanted not in _INCLUDED:
                raise unsupported("include", f"'{wanted[:80]}' is not known")
        if self.stream_options is not None and self.stream_options.get("include_obfuscation"):
            reason = STREAM_OPTIONS.refused["include_obfuscation"].reason
            raise unsupported("stream_options.include_obfuscation", reason)
        if self.text is not None and self.text.get("verbosity") not in (None, "medium"):
            raise unsupported("text.verbosity", "say it in a message")

    def options(self) -> CompletionOptions:
        """See `RequestBody`."""
        choice: Any = self.tool_choice
        if isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": choice["name"]}}
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": _messages(self.instructions, self.input),
            "max_tokens": self.max_output_tokens,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_function(tool) for tool in self.tools or ()] or None,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _response_format(self.text.get("format") if self.text else None),
            "reasoning_effort": self.reasoning.get("effort") if self.reasoning else None,
        }
        return chat_body(fields, CHAT_NAMES)

    def media_places(self) -> dict[str, str]:
        """See `RequestBody`."""
        for number, item in enumerate(self.input if isinstance(self.input, list) else ()):
            name = "output" if item.get("type") == "function_call_output" else "content"
            parts = item.get(name)
            for index, part in enumerate(parts if isinstance(parts, list) else ()):
                if part.get("type") == "input_image":
                    return {"image": f"input[{number}].{name}[{index}].type"}
        return {}

    def notes(self) -> bytes:
        """See `RequestBody`. The answer repeats these fields: they are the inner part of a JSON object."""
        further = self.model_extra or {}
        fields = {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": further.get("max_tool_calls"),
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": further.get("prompt_cache_key"),
            "reasoning": {"effort": None, "summary": None, **dict(self.reasoning or {})},
            "safety_identifier": further.get("safety_identifier"),
            "service_tier": "default",
            "store": False,
            "temperature": self.temperature,
            "text": {"format": {"type": "text"}, **dict(self.text or {})},
            "tool_choice": self.tool_choice or "auto",
            "tools": [{"parameters": None, "strict": None, **tool} for tool in self.tools or ()],
            "top_p": self.top_p,
            "truncation": "disabled",
            "user": further.get("user"),
        }
        return ascii_json(fields)[1:-1].encode()


# --------------------------------------------------------------------------- conversion


def _messages(instructions: str | None, given: str | list[Any]) -> list[dict[str, Any]]:
    """Return the messages of a conversation. What an answer consists of becomes one message again."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    answer: dict[str, Any] | None = None  # the assistant's message that further items may belong to
    for item in given:
        kind = item.get("type", "message")
        if kind == "function_call_output":
            messages.append(
                {"role": "tool", "tool_call_id": item["call_id"], "content": _parts(item["output"])}
            )
        elif kind == "message" and item["role"] != "assistant":
            messages.append({"role": item["role"], "content": _parts(item["content"])})
        else:
            if answer is None or not _belongs(kind, answer):
                answer = {"role": "assistant", "content": None}
                messages.append(answer)
            _add(answer, kind, item)
            continue
        answer = None
    for message in messages:
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
    return messages


def _belongs(kind: str, answer: Mapping[str, Any]) -> bool:
    """Return whether an item of this kind can follow in the same answer: reasoning, text, calls."""
    if kind == "function_call":
        return True
    if kind == "message":
        return answer["content"] is None and "tool_calls" not in answer
    return answer.keys() == {"role", "content", "reasoning_content"} and answer["content"] is None


def _add(answer: dict[str, Any], kind: str, item: Mapping[str, Any]) -> None:
    if kind == "message":
        answer["content"] = _parts(item["content"])
    elif kind == "reasoning":
        texts = [each["text"] for each in item.get("content") or item.get("summary") or ()]
        answer["reasoning_content"] = "\n".join([*filter(None, [answer.get("reasoning_content")]), *texts])
    else:
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        answer.setdefault("tool_calls", []).append(call)


def _parts(content: str | Iterable[Mapping[str, Any]]) -> Any:
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "input_image":
            image = {"url": part["image_url"]}
            if part.get("detail") is not None:
                image["detail"] = part["detail"]
            parts.append({"type": "image_url", "image_url": image})
        elif part["type"] == "refusal":
            parts.append({"type": "refusal", "refusal": part.get("refusal", "")})
        else:
            parts.append({"type": "text", "text": part.get("text", "")})
    return parts


def _function(tool: Tool) -> dict[str, Any]:
    names = ("name", "description", "parameters", "strict")
    function = {name: value for name, value in tool.items() if name in names and value is not None}
    return {"type": "function", "function": function}


def _response_format(wanted: TextFormat | None) -> dict[str, Any] | None:
    if wanted is None or wanted["type"] != "json_schema":
        return None if wanted is None else {"type": wanted["type"]}
    described = {name: value for name, value in wanted.items() if name != "type" and value is not None}
    return {"type": "json_schema", "json_schema": described}
