"""Chat templates: a conversation → the text of a prompt, as `transformers` renders it.

Source of the semantics: `transformers` 5.24, `apply_chat_template` and `render_jinja_template`. A template
comes with a model's files, so it runs in a sandbox and within limits of time, memory and output, see
`sandbox.py`, and in a process of its own, see `__main__.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jinja2

from dynamo_redis.errors import ModelError, TemplateError
from dynamo_redis.templates.protocol import (
    MEMORY_LIMIT_BYTES,
    OUTPUT_LIMIT_CHARS,
    PROBE_LIMIT_S,
    PROBE_MEMORY_LIMIT_BYTES,
    RENDER_LIMIT_S,
)
from dynamo_redis.templates.sandbox import Runaway, TemplateEnvironment

Message = dict[str, Any]

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

ContentForm = Literal["text", "parts", "either"]


class CompiledTemplates:
    """The chat templates of one model, compiled."""

    def __init__(self, templates: Mapping[str, str], tokenizer_config: Mapping[str, Any]) -> None:
        """`templates` maps names to Jinja source; `default` is used, and `tool_use` (if any) with tools.

        Blocks while probes are rendered. Raises ModelError for a template that does not compile or does not
        end. Named ones without a default are refused by `render` where the default would be used.
        Special tokens (`bos_token`, …) come from `tokenizer_config`, as strings or as token objects.
        """
        environment = TemplateEnvironment()
        self._variants = {name: _Variant(name, source, environment) for name, source in templates.items()}
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
    ) -> str:
        """The prompt's text. `variables` are what the template may ask for beyond these (`enable_thinking`).

        Messages are in OpenAI's form and are not changed. Text parts are joined for templates that expect
        text, and text is made a part for those that expect parts. Arguments of tool calls, which OpenAI
        writes as a JSON string, stay one where the template can write a string, and become an object where
        it cannot. Raises TemplateError, with the template's own message, for what it refuses.
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
        return _cut_at_mark(text) if continue_final_message else text


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens by name, as templates see them. A token is a string or `{"content": …, …}`.

    Models of several media have further ones under names of their own, which end in `_token` or stand in
    `extra_special_tokens`.
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
    """One compiled template, and what trial renderings tell about the messages it expects."""

    def __init__(self, name: str, source: str, environment: TemplateEnvironment) -> None:
        self._name = name
        self._environment = environment
        try:
            self._template = environment.from_string(source)
        except Exception as exc:  # Jinja's own errors, and Python's for what nests too deeply
            raise ModelError(f"chat template {name!r} does not compile: {_one_line(exc)}") from exc
        self._content_form: ContentForm = "text"
        self._writes_string_arguments = False
        self._knows_developers = True
        self._takes_null = _Answers(False, False)
        self._takes_absence = _Answers(False, False)

    def examine(self, variables: Mapping[str, Any]) -> None:
        """Find out, by rendering probes, which form of content and of tool call arguments is understood."""
        probe = "content-probe"
        as_text = self._try([{"role": "user", "content": probe}], variables)
        as_parts = self._try([{"role": "user", "content": [{"type": "text", "text": probe}]}], variables)
        reads_parts = as_parts is not None and probe in as_parts and "'text'" not in as_parts
        reads_parts = reads_parts and as_parts is not None and '"text"' not in as_parts
        if reads_parts:
            self._content_form = "either" if as_text is not None and probe in as_text else "parts"
        developer = self.normalise({"role": "developer", "content": probe})
        written = self._try([developer, self.normalise({"role": "user", "content": "Hi"})], variables)
        self._knows_developers = written is not None and probe in written
        self._examine_answers(variables)

    def _examine_answers(self, variables: Mapping[str, Any]) -> None:
        """Find out what the template makes of an assistant's message without content, and of tool calls.

        Content may be null, absent or empty there, and arguments a string or an object: a template that
        understands the one may fail on the other, or leave the call out.
        """
        arguments = {"probe-name": "probe-argument"}
        written = json.dumps(arguments)
        user = self.normalise({"role": "user", "content": "Hi"})

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
        self._takes_null = _Answers(with_calls.takes(with_calls.null), alone.takes(alone.null))
        self._takes_absence = _Answers(with_calls.takes(with_calls.absent), alone.takes(alone.absent))

    def _try(self, messages: list[Message], variables: Mapping[str, Any]) -> str | None:
        values = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return self.render({**variables, **values, "messages": messages}, is_probe=True)
        except Runaway as exc:
            raise ModelError(f"chat template {self._name!r} does not end on a short message: {exc}") from exc
        except TemplateError:
            return None

    def render(self, variables: Mapping[str, Any], *, is_probe: bool = False) -> str:
        """Render within the limits. Raises TemplateError."""
        pieces: list[str] = []
        written = 0
        time_s = PROBE_LIMIT_S if is_probe else RENDER_LIMIT_S
        memory_bytes = PROBE_MEMORY_LIMIT_BYTES if is_probe else MEMORY_LIMIT_BYTES
        with self._environment.limits(time_s=time_s, memory_bytes=memory_bytes):
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
            except Exception as exc:  # whatever operations on a conversation it did not expect may raise
                raise TemplateError(f"the chat template failed: {type(exc).__name__}: {exc}") from exc
        return "".join(pieces)

    def normalise(self, message: Message) -> Message:
        """A copy of an OpenAI message, as the template expects it.

        Keys without a value are dropped. An assistant's message without content, which has only tool calls,
        keeps it null or absent as the client sent it where the template understands that; templates that add
        it to text get it empty. A developer's message is a system message where the template would leave it
        out.
        """
        result = {key: value for key, value in message.items() if value is not None}
        if message.get("role") == "assistant":
            if "content" not in result:
                result |= self._without_content("content" in message, bool(result.get("tool_calls")))
        elif message.get("role") == "developer" and not self._knows_developers:
            result["role"] = "system"
        content = result.get("content")
        if isinstance(content, list) and self._content_form == "text":
            result["content"] = "\n".join(map(_part_text, content))
        elif isinstance(content, str) and self._content_form == "parts":
            result["content"] = [{"type": "text", "text": content}]
        reasoning = next((result[name] for name in _REASONING_FIELDS if name in result), None)
        if reasoning is not None:
            result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
        if (calls := result.get("tool_calls")) and not self._writes_string_arguments:
            result["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
        return result

    def _without_content(self, is_null: bool, has_calls: bool) -> dict[str, str | None]:
        """The content of an assistant's message that has none: as it was sent, else in the other form, else
        empty text."""
        takes_absence = self._takes_absence.of(has_calls)
        if self._takes_null.of(has_calls) and (is_null or not takes_absence):
            return {"content": None}
        return {} if takes_absence else {"content": ""}


class _Answers(NamedTuple):
    """Something that a template does, or does not, with an assistant's message."""

    with_calls: bool
    alone: bool

    def of(self, has_calls: bool) -> bool:
        """Whether it does so with one that has tool calls, or has none."""
        return self.with_calls if has_calls else self.alone


class _Contents(NamedTuple):
    """Texts that a template writes for a message whose content is null, absent or empty; None if it fails."""

    null: str | None
    absent: str | None
    empty: str | None

    def takes(self, text: str | None) -> bool:
        """Whether a text is one that the template means: it is none of a failure, writes no "None" for null,
        and leaves out no tool call that the template writes of another form."""
        if text is None:
            return False
        writes_calls = any(other is not None and "probe-call" in other for other in self)
        writes_null = text.count("None") > (self.empty or "").count("None")
        return not writes_null and ("probe-call" in text or not writes_calls)


def _one_line(exc: Exception) -> str:
    line = f", line {exc.lineno}" if isinstance(exc, jinja2.TemplateSyntaxError) else ""
    return (
        " ".join(f"{getattr(exc, 'message', None) or str(exc) or type(exc).__name__}".split()).rstrip(".")
        + line
    )


def _part_text(part: Any) -> str:
    return part if isinstance(part, str) else str(part.get("text") or part.get("refusal") or "")


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
    """Put a mark behind the final message's text, at which the rendered prompt is cut."""
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
    position = text.rfind(_CONTINUE_TAG.strip())
    if position < 0:
        raise TemplateError("continue_final_message is set, but the template leaves the final message out")
    kept = text[:position]
    # Where the template trims messages, the space at the mark's end is gone: then trim here as well.
    return kept if text.startswith(_CONTINUE_TAG, position) else kept.rstrip()
