"""The body of Anthropic's Messages, and its conversion to the body of a chat.

Source: the types of Anthropic's own client. Parameters that are no fields here are refused by name, or change
no answer: `ANTHROPIC`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from dynamo_redis.frontend.openai import Effort, MediaAddress, chat_body
from dynamo_redis.frontend.options import CompletionOptions, RequestBody, StopString, by_type
from dynamo_redis.frontend.parameters import Parameters, Refusal, unsupported

MAX_STOPS: Final = 64

BILLING_HEADER: Final = "x-anthropic-billing-header"
"""The beginning of a block that Claude Code puts before its system prompt, for Anthropic's accounts. It
differs from request to request: no later block would be found in a cache."""

HIDES_THINKING: Final = b"thinking omitted"

_CLOSED: Final = ConfigDict(extra="forbid", strict=True)


# --------------------------------------------------------------------------- blocks


class TextBlock(TypedDict):
    """Text. Citations say where it came from; no template reads them."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["text"]
    text: str
    citations: NotRequired[Any]
    cache_control: NotRequired[Any]


class UrlSource(TypedDict):
    """The address of an image."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["url"]
    url: MediaAddress


class Base64Source(TypedDict):
    """The content of an image. Its check names all types: a URL has its own."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["base64", "url"]
    media_type: Annotated[str, Field(pattern=r"^[\w.+-]{1,64}/[\w.+-]{1,64}$")]
    data: Annotated[str, Field(min_length=1)]


def _source_tag(value: object) -> str:
    return "<url>" if isinstance(value, dict) and value.get("type") == "url" else "<base64>"


ImageSource = Annotated[
    Annotated[UrlSource, Tag("<url>")] | Annotated[Base64Source, Tag("<base64>")],
    Discriminator(_source_tag),
]


class ImageBlock(TypedDict):
    """An image."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["image"]
    source: ImageSource
    cache_control: NotRequired[Any]


class ThinkingBlock(TypedDict):
    """Reasoning of an earlier answer. The signature proves nothing here."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["thinking"]
    thinking: str
    signature: NotRequired[Any]


class RedactedBlock(TypedDict):
    """Reasoning that Anthropic has encrypted: only Anthropic's models can use it."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["redacted_thinking"]
    data: NotRequired[Any]


class ToolUseBlock(TypedDict):
    """A tool call of an earlier answer."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: NotRequired[Any]
    cache_control: NotRequired[Any]


_BLOCK_TYPES: Final = ("text", "image", "thinking", "redacted_thinking", "tool_use", "tool_result")


def _check_block_type(value: object) -> object:
    if isinstance(value, dict) and value.get("type") not in _BLOCK_TYPES:
        raise PydanticCustomError(
            "block_type",
            "there are blocks of type {types} here, not of type {type}",
            {"types": ", ".join(_BLOCK_TYPES), "type": repr(value.get("type"))[:80]},
        )
    return value


def _block_tag(value: object) -> str | None:
    return f"<{value['type']}>" if isinstance(value, dict) else None


_NO_BLOCK: Final = {"custom_error_type": "block", "custom_error_message": "Input should be a block"}

ResultBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ImageBlock, Tag("<image>")],
    Discriminator(_block_tag, **_NO_BLOCK),
    BeforeValidator(_check_block_type),
]


class ToolResultBlock(TypedDict):
    """The result of a tool call."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["tool_result"]
    tool_use_id: str
    content: NotRequired[
        Annotated[
            Annotated[str, Tag("<text>")]
            | Annotated[list[ResultBlock], Field(fail_fast=True), Tag("<blocks>")]
            | Annotated[None, Tag("<none>")],
            Discriminator(
                by_type(str="<text>", list="<blocks>", NoneType="<none>"),
                custom_error_type="content_type",
                custom_error_message="Input should be a string or a list of blocks",
            ),
        ]
    ]
    is_error: NotRequired[bool | None]
    cache_control: NotRequired[Any]


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(_block_tag, **_NO_BLOCK),
    BeforeValidator(_check_block_type),
]

_TEXT_OR_BLOCKS: Final = Discriminator(
    by_type(str="<text>", list="<blocks>"),
    custom_error_type="content_type",
    custom_error_message="Input should be a string or a list of blocks",
)

Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Block], Field(fail_fast=True), Tag("<blocks>")],
    _TEXT_OR_BLOCKS,
]

System = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextBlock], Field(fail_fast=True), Tag("<blocks>")],
    _TEXT_OR_BLOCKS,
]


# --------------------------------------------------------------------------- the body


class Turn(TypedDict):
    """One message of a conversation."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    role: Literal["user", "assistant", "system"]
    content: Content


class Tool(TypedDict):
    """A tool of the client. Those of Anthropic's servers have other types."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    type: NotRequired[str | None]
    name: str
    description: NotRequired[str | None]
    input_schema: NotRequired[dict[str, Any]]
    strict: NotRequired[bool | None]


class ToolChoice(TypedDict):
    """`tool_choice`."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["auto", "any", "tool", "none"]
    name: NotRequired[str]
    disable_parallel_tool_use: NotRequired[bool | None]


class Thinking(TypedDict):
    """`thinking`."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: NotRequired[Annotated[int, Field(ge=1)] | None]
    display: NotRequired[Literal["summarized", "omitted"] | None]


class JsonFormat(TypedDict):
    """`output_config.format`."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(TypedDict):
    """`output_config`."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    effort: NotRequired[Effort | None]
    format: NotRequired[JsonFormat | None]


_STATELESS: Final = Refusal("nothing is stored: send the whole conversation as 'messages'")
_ELSEWHERE: Final = Refusal("it is a service of Anthropic's own servers")

ANTHROPIC: Final = Parameters(
    refused={
        "billing_policy": _ELSEWHERE,
        "compaction": _STATELESS,
        "container": _ELSEWHERE,
        "mcp_servers": Refusal("it is a service of Anthropic's own servers", ([],)),
        "diagnostics": _ELSEWHERE,
        "fallback_credit_token": _ELSEWHERE,
        "fallbacks": Refusal("one model answers", ([],)),
        "inference_geo": _ELSEWHERE,
        "speed": Refusal("there is one speed", ("standard",)),
        "user_profile_id": _ELSEWHERE,
        "workspace_id": _ELSEWHERE,
        "max_tokens_to_sample": Refusal("use 'max_tokens'"),
        "output_format": Refusal("use 'output_config.format'"),
        "stop": Refusal("use 'stop_sequences'"),
        "thread": _STATELESS,
    },
    harmless={
        "cache_control": "blocks are kept without being asked for",
        "metadata": "names the end user",
        "service_tier": "there is one tier",
    },
)

_TOOL: Final = Parameters(
    refused={
        "defer_loading": Refusal("each tool is shown to the model", (False,)),
        "input_examples": Refusal("describe them in 'description'", ([],)),
        "allowed_callers": Refusal("the model alone calls tools", (["direct"],)),
    },
    harmless={
        "cache_control": "blocks are kept without being asked for",
        "eager_input_streaming": "arguments are always streamed as they come",
    },
)

_CHAT_NAMES: Final = {
    "max_tokens": "max_tokens",
    "messages": "messages",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "response_format.json_schema.schema": "output_config.format.schema",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "stop": "stop_sequences",
    "tool_choice.function.name": "tool_choice.name",
    "thinking_token_budget": "thinking.budget_tokens",
}
"""The names that a chat's parameters have here."""


class MessagesBody(RequestBody):
    """`POST /v1/messages`."""

    tag = b"m"
    further_parameters = ANTHROPIC

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None
    system: System | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def refuse_unsupported(self) -> None:
        """See `CheckedBody`."""
        super().refuse_unsupported()
        for edit in (self.context_management or {}).get("edits") or ():
            kind = str(edit.get("type") if isinstance(edit, dict) else edit)[:80]
            if not kind.startswith("clear_thinking_"):  # templates leave out earlier thinking by themselves
                raise unsupported("context_management.edits", f"'{kind}': conversations are answered as sent")
        for index, tool in enumerate(self.tools or ()):
            kind = tool.get("type") or "custom"
            if kind != "custom":
                raise unsupported(
                    f"tools[{index}].type", f"'{kind[:80]}' is a tool of Anthropic's, not one of the client's"
                )
            further = {name: value for name, value in tool.items() if name not in Tool.__annotations__}
            _TOOL.check(further, Tool.__annotations__, f"tools[{index}].")

    def options(self) -> CompletionOptions:
        """See `RequestBody`."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": _messages(self.system, self.messages),
            "max_tokens": self.max_tokens,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "tools": [_function(tool) for tool in self.tools or ()] or None,
            **_tool_choice(self.tool_choice),
            **self._thinking(),
            **_output(self.output_config),
        }
        if self.messages[-1]["role"] == "assistant":  # the answer continues the beginning that is given
            fields |= {"add_generation_prompt": False, "continue_final_message": True}
        body = chat_body(fields, _CHAT_NAMES)
        body.stop = self.stop_sequences
        body.fit_tokens()
        return body

    def media_places(self) -> dict[str, str]:
        """See `RequestBody`."""
        for number, turn in enumerate(self.messages):
            for index, block in enumerate(_blocks(turn)):
                at = f"messages[{number}].content[{index}]"
                if block["type"] == "image":
                    return {"image": f"{at}.type"}
                for inner_index, inner in enumerate(_blocks(block)):
                    if inner["type"] == "image":
                        return {"image": f"{at}.content[{inner_index}].type"}
        return {}

    def notes(self) -> bytes:
        """See `RequestBody`. The form needs to know whether the text of the model's thinking is wanted."""
        return HIDES_THINKING if self.thinking and self.thinking.get("display") == "omitted" else b""

    def _thinking(self) -> dict[str, Any]:
        variables = dict(self.chat_template_kwargs or {})
        fields: dict[str, Any] = {}
        if self.thinking is not None:
            variables.setdefault("enable_thinking", self.thinking["type"] != "disabled")
            budget = self.thinking.get("budget_tokens")
            # Clients that want no bound give one that the answer's own bound reaches first.
            if budget is not None and (self.max_tokens is None or budget < self.max_tokens - 1):
                fields["thinking_token_budget"] = budget
        return {**fields, "chat_template_kwargs": variables or None}


class CountBody(MessagesBody):
    """`POST /v1/messages/count_tokens`."""

    tag = b"n"
    max_tokens: Annotated[int, Field(ge=1)] | None = None


# --------------------------------------------------------------------------- conversion


def _messages(system: str | list[TextBlock] | None, turns: Iterable[Turn]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": _system_content(system)})
    for turn in turns:
        content = turn["content"]
        if turn["role"] == "system":
            messages.append({"role": "system", "content": _system_content(content)})
        elif isinstance(content, str):
            messages.append({"role": turn["role"], "content": content})
        elif turn["role"] == "assistant":
            messages.append(_assistant(content))
        else:
            messages += _user(content)
    return [message for message in messages if message.get("content") != []]


def _system_content(content: str | list[Any]) -> Any:
    if isinstance(content, str):
        return content
    return [_part(block) for block in content if not block.get("text", "").startswith(BILLING_HEADER)]


def _assistant(blocks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the message of an earlier answer."""
    parts, thinking, calls = [], [], []
    for block in blocks:
        if block["type"] == "thinking":
            thinking.append(block["thinking"])
        elif block["type"] == "tool_use":
            function = {
                "name": block["name"],
                "arguments": json.dumps(block["input"], ensure_ascii=False),
            }
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif block["type"] != "redacted_thinking":
            parts.append(_part(block))
    message: dict[str, Any] = {"role": "assistant", "content": parts or None}
    if not parts and not calls:
        message["content"] = ""
    if thinking:
        message["reasoning_content"] = "\n".join(thinking)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(blocks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of a user's turn: one for each tool result, and one for what stands around them."""
    messages: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for block in blocks:
        if block["type"] != "tool_result":
            parts.append(_part(block))
            continue
        if parts:
            messages.append({"role": "user", "content": parts})
            parts = []
        content = block.get("content") or ""
        message = {
            "role": "tool",
            "tool_call_id": block["tool_use_id"],
            "content": content if isinstance(content, str) else [_part(each) for each in content],
        }
        if block.get("is_error"):
            message["is_error"] = True  # for the template, as all that OpenAI's messages lack
        messages.append(message)
    return [*messages, {"role": "user", "content": parts}]


def _part(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a block as a part of a chat's message. Blocks with another place in the conversation are left
    for the chat's own check of its parts."""
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    if block["type"] == "image":
        source = block["source"]
        url = source["url"] if "url" in source else f"data:{source['media_type']};base64,{source['data']}"
        return {"type": "image_url", "image_url": {"url": url}}
    raise unsupported("messages", f"a block of type {block['type']} is in a message of the other role")


def _blocks(owner: Mapping[str, Any]) -> list[Any]:
    """Return the blocks of a turn or of a tool's result; none of a text."""
    content = owner.get("content")
    return content if isinstance(content, list) else []


def _function(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool["name"]}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    function["parameters"] = tool.get("input_schema", {"type": "object"})
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    kinds: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    wanted = kinds.get(choice["type"]) or {"type": "function", "function": {"name": choice.get("name", "")}}
    fields: dict[str, Any] = {"tool_choice": wanted}
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    return fields


def _output(config: OutputConfig | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if config is None:
        return fields
    if config.get("effort") is not None:
        fields["reasoning_effort"] = config["effort"]
    wanted = config.get("format")
    if wanted is not None:
        described = {"name": "answer", "schema": wanted["schema"]}
        fields["response_format"] = {"type": "json_schema", "json_schema": described}
    return fields
