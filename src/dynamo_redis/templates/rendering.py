"""Chat templates: a conversation → the text of a prompt, as `transformers` renders it.

Source of the semantics: `transformers` 5.24, `apply_chat_template` and `render_jinja_template`. A template
comes with a model's files. So it runs in a sandbox with limits of time, memory and output (`sandbox.py`), and
in a separate process (`__main__.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Self

import jinja2

from dynamo_redis.errors import ModelError, TemplateError
from dynamo_redis.templates.masking import Masking
from dynamo_redis.templates.protocol import (
    OUTPUT_LIMIT_CHARS,
    PROBE_LIMITS,
    RENDER_LIMITS,
    RenderLimits,
)
from dynamo_redis.templates.sandbox import Runaway, TemplateEnvironment

Message = dict[str, Any]

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

ContentForm = Literal["text", "parts", "either"]


class RenderedPrompt(str):
    """The text of a prompt. Unless `mask` is empty, it stands in each name of a special token that comes from
    a client's text, and is no part of the prompt."""

    __slots__ = ("mask",)
    mask: str

    def __new__(cls, text: str, mask: str) -> Self:
        """Make the text with its mask."""
        prompt = super().__new__(cls, text)
        prompt.mask = mask
        return prompt


class CompiledTemplates:
    """The chat templates of one model, compiled."""

    def __init__(
        self,
        templates: Mapping[str, str],
        tokenizer_config: Mapping[str, Any],
        special_names: Iterable[str] = (),
        limits: RenderLimits = RENDER_LIMITS,
    ) -> None:
        """`templates` maps names to Jinja source; `default` is used, and `tool_use` (if any) with tools.

        Blocks while probes are rendered. Raises ModelError for a template that does not compile or does not
        end. Without a `default`, `render` raises where it would be used.
        Special tokens (`bos_token`, …) come from `tokenizer_config`, as strings or as token objects.
        `special_names` are masked in the texts of clients.
        """
        self._masking = Masking(special_names)
        environment = TemplateEnvironment()
        self._variants = {
            name: _Variant(name, source, environment, limits) for name, source in templates.items()
        }
        self._special_tokens = special_tokens(tokenizer_config)
        for variant in self._variants.values():
            variant.examine(self._special_tokens)

    def render(
        self,
        /,  # a variable may have this name
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> RenderedPrompt:
        """Return the prompt's text. `variables` are further variables of the template (`enable_thinking`).

        Messages are in OpenAI's form and are not changed. Text parts are joined for templates that expect
        text, and text becomes a part for those that expect parts. The arguments of tool calls, a JSON string
        in OpenAI's form, stay a string if the template can write one, and else become an object. Raises
        TemplateError, with the template's own message, if the template refuses the conversation.
        """
        variant = self._variants.get("default")
        if tools is not None:
            variant = self._variants.get("tool_use", variant)
        if variant is None:
            raise TemplateError(
                f"the model has chat templates called {', '.join(sorted(self._variants))}, and none of them "
                "is the default"
            )
        conversation = [variant.normalise(message) for message in messages]
        given, mask = (conversation, tools, documents, variables), ""
        if self._masking.is_needed(given):
            mask = self._masking.mask_for(given)
            conversation, tools, documents, variables = (self._masking.masked(each, mask) for each in given)
        if continue_final_message:
            _mark_final(conversation)
        text = variant.render(
            {
                **self._special_tokens,
                **variables,
                "messages": conversation,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt and not continue_final_message,
            }
        )
        if continue_final_message:
            text = _cut_at_mark(text)
        return RenderedPrompt(text, mask)


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return special tokens by name, as templates see them. A token is a string or `{"content": …, …}`.

    Multimodal models have further tokens. Their names end in `_token`, or are in `extra_special_tokens`.
    """
    extra = tokenizer_config.get("extra_special_tokens")
    named = {name: token for name, token in tokenizer_config.items() if name.endswith("_token")}
    found: dict[str, Any] = {}
    for name, token in (named | (extra if isinstance(extra, dict) else {})).items():
        text = _token_text(token)
        if text is not None:
            found[name] = text
    additional = tokenizer_config.get("additional_special_tokens")
    if isinstance(additional, list):
        found["additional_special_tokens"] = [_token_text(token) for token in additional]
    return found


def _token_text(token: object) -> str | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


# --------------------------------------------------------------------------- one template


class _Variant:
    """One compiled template, and the form of messages that it expects, found by test renderings."""

    def __init__(
        self, name: str, source: str, environment: TemplateEnvironment, limits: RenderLimits
    ) -> None:
        self._name = name
        self._limits = limits
        self._environment = environment
        try:
            self._template = environment.from_string(source)
            self._template.globals = dict(self._template.globals)  # each rendering copies them
        except Exception as exc:  # Jinja's own errors, and Python's for too deep nesting
            reason = " ".join(str(getattr(exc, "message", None) or str(exc) or type(exc).__name__).split())
            line = f", line {exc.lineno}" if isinstance(exc, jinja2.TemplateSyntaxError) else ""
            raise ModelError(f"chat template {name!r} does not compile: {reason.rstrip('.')}{line}") from exc
        self._content_form: ContentForm = "text"
        self._writes_string_arguments = False
        self._knows_developers = True
        self._takes_null = _ByCalls(False, False)
        self._takes_absence = _ByCalls(False, False)

    def examine(self, variables: Mapping[str, Any]) -> None:
        """Find out, by rendering probes, the forms of content, of an assistant's message without content, and
        of tool call arguments that the template reads."""
        probe = "content-probe"
        as_text = self._try([{"role": "user", "content": probe}], variables)
        as_parts = self._try([{"role": "user", "content": [{"type": "text", "text": probe}]}], variables)
        reads_parts = as_parts is not None and probe in as_parts and "'text'" not in as_parts
        reads_parts = reads_parts and as_parts is not None and '"text"' not in as_parts
        if reads_parts:
            self._content_form = "either" if as_text is not None and probe in as_text else "parts"
        user = self.normalise({"role": "user", "content": "Hi"})
        text = self._try([self.normalise({"role": "developer", "content": probe}), user], variables)
        self._knows_developers = text is not None and probe in text

        # An assistant's message without content may have it null, absent or empty, and the arguments of its
        # tool calls a string or an object. A template that reads one form may fail on another, or leave out
        # the call.
        arguments = {"probe-name": "probe-argument"}
        written = json.dumps(arguments)

        def answers(**message: Any) -> _Contents:
            message["role"] = "assistant"
            forms = (message | {"content": None}, message, message | {"content": ""})
            return _Contents(*(self._try([user, form], variables) for form in forms))

        def calls(arguments: Any) -> _Contents:
            function = {"name": "probe-call", "arguments": arguments}
            return answers(tool_calls=[{"type": "function", "id": "call00000", "function": function}])

        by_string, alone = calls(written), answers()
        self._writes_string_arguments = any(text is not None and written in text for text in by_string)
        with_calls = by_string if self._writes_string_arguments else calls(arguments)
        self._takes_null = _ByCalls(with_calls.takes(with_calls.null), alone.takes(alone.null))
        self._takes_absence = _ByCalls(with_calls.takes(with_calls.absent), alone.takes(alone.absent))

    def _try(self, messages: list[Message], variables: Mapping[str, Any]) -> str | None:
        values = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return self.render({**variables, **values, "messages": messages}, is_probe=True)
        except Runaway as exc:
            raise ModelError(f"chat template {self._name!r} does not end on a short message: {exc}") from exc
        except TemplateError:
            return None

    def render(self, variables: Mapping[str, Any], *, is_probe: bool = False) -> str:
        """Render the template within the limits. Raises TemplateError."""
        pieces: list[str] = []
        written = 0
        limits = PROBE_LIMITS if is_probe else self._limits
        with self._environment.limits(time_s=limits.time_s, memory_bytes=limits.memory_bytes):
            try:
                for piece in self._template.generate(variables):
                    written += len(piece)
                    if written > OUTPUT_LIMIT_CHARS:
                        raise Runaway(f"the chat template wrote over {OUTPUT_LIMIT_CHARS} characters")
                    self._environment.check_time()
                    pieces.append(piece)
            except TemplateError:
                raise
            except jinja2.TemplateError as exc:
                raise TemplateError(exc.message or type(exc).__name__) from exc
            except MemoryError as exc:
                raise Runaway("the chat template needs more memory than there is") from exc
            except Exception as exc:  # an operation on an unexpected conversation may raise any exception
                raise TemplateError(f"the chat template failed: {type(exc).__name__}: {exc}") from exc
        return "".join(pieces)

    def normalise(self, message: Message) -> Message:
        """Return a copy of an OpenAI message in the form that the template expects.

        Keys without a value are dropped. An assistant's message with only tool calls keeps its content null
        or absent, as the client sent it, if the template reads that form. Else its content is empty text, for
        templates that add it to text. A developer's message becomes a system message if the template would
        leave it out.
        """
        result = {key: value for key, value in message.items() if value is not None}
        if message.get("role") == "assistant":
            if "content" not in result:
                # As it was sent, else in the other form, else as empty text.
                has_calls = bool(result.get("tool_calls"))
                takes_absence = self._takes_absence.of(has_calls)
                if self._takes_null.of(has_calls) and ("content" in message or not takes_absence):
                    result["content"] = None
                elif not takes_absence:
                    result["content"] = ""
        elif message.get("role") == "developer" and not self._knows_developers:
            result["role"] = "system"
        content = result.get("content")
        if isinstance(content, list) and self._content_form == "text":
            result["content"] = "\n".join(
                part if isinstance(part, str) else str(part.get("text") or part.get("refusal") or "")
                for part in content
            )
        elif isinstance(content, str) and self._content_form == "parts":
            result["content"] = [{"type": "text", "text": content}]
        reasoning = next((result[name] for name in _REASONING_FIELDS if name in result), None)
        if reasoning is not None:
            result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
        if (calls := result.get("tool_calls")) and not self._writes_string_arguments:
            result["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
        return result


class _ByCalls(NamedTuple):
    """A property of a template for assistants' messages with tool calls, and for those without."""

    with_calls: bool
    alone: bool

    def of(self, has_calls: bool) -> bool:
        """Return the property for a message with or without tool calls."""
        return self.with_calls if has_calls else self.alone


class _Contents(NamedTuple):
    """Texts that a template writes for a message with null, absent or empty content; None if it fails."""

    null: str | None
    absent: str | None
    empty: str | None

    def takes(self, text: str | None) -> bool:
        """Return whether a text shows that the template reads the form: it did not fail, it writes no "None"
        for null, and it leaves out no tool call that the template writes for another form."""
        if text is None:
            return False
        writes_calls = any(other is not None and "probe-call" in other for other in self)
        writes_null = text.count("None") > (self.empty or "").count("None")
        return not writes_null and ("probe-call" in text or not writes_calls)


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError) as exc:
        raise TemplateError(f"the arguments of a tool call are not JSON: {exc}") from exc
    return {**call, "function": {**function, "arguments": parsed}}


# --------------------------------------------------------------------------- continuing the final message


def _mark_final(conversation: list[Message]) -> None:
    """Append a mark to the final message's text, at which the rendered prompt is cut."""
    content = conversation[-1].get("content") if conversation else None
    if isinstance(content, str) and content:
        conversation[-1]["content"] = content + _CONTINUE_TAG
        return
    if isinstance(content, list):
        for index in range(len(content) - 1, -1, -1):
            if "text" in content[index]:
                marked = {**content[index], "text": content[index]["text"] + _CONTINUE_TAG}
                conversation[-1]["content"] = [*content[:index], marked, *content[index + 1 :]]
                return
    raise TemplateError("continue_final_message is set, but the final message has no text to continue")


def _cut_at_mark(text: str) -> str:
    """Return the text up to the mark."""
    position = text.rfind(_CONTINUE_TAG.strip())
    if position < 0:
        raise TemplateError("continue_final_message is set, but the template leaves the final message out")
    # Without the space at the mark's end, the template trims messages: then the prompt is trimmed as well.
    kept = text[:position]
    return kept if text.startswith(_CONTINUE_TAG, position) else kept.rstrip()
