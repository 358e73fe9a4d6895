"""Tool formats whose calls have a name between markers, and then their arguments: in JSON, or one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dynamo_redis.parsers.calls import LONGEST_NAME, Calls, ToolFormat
from dynamo_redis.parsers.json_calls import read_arguments, read_list
from dynamo_redis.parsers.json_text import MOST_HELD, written
from dynamo_redis.parsers.reader import CutOff, Malformed, Reader, Steps

# --------------------------------------------------------------------------- sections


@dataclass(frozen=True, slots=True)
class Section:
    """The markers of a section of calls, of a call in it, and between a call's name and its arguments."""

    begin: str
    call_begin: str
    separator: str
    call_end: str
    end: str

    def format(self) -> ToolFormat:
        """Return the format. Some models leave out the marker of the section."""
        return ToolFormat(
            (self.begin, self.call_begin), self.read, markers=(self.separator, self.call_end, self.end)
        )

    def read(self, reader: Reader, calls: Calls, marker: str) -> Steps[None]:
        """Read the calls of a section, or after its first call's marker."""
        if marker == self.begin:
            yield from reader.skip_space()
            yield from reader.expect(self.call_begin)
        while True:
            yield from self._read_call(reader, calls)
            yield from reader.skip_space()
            if not (yield from reader.optional(self.call_begin)):
                break
        yield from reader.close(self.end)

    def _read_call(self, reader: Reader, calls: Calls) -> Steps[None]:
        head, _ = yield from reader.until((self.separator,), LONGEST_NAME)
        name, call_id = head.strip(), None
        if name.startswith("functions."):  # Kimi's: `functions.name:index` is the id
            call_id = name
            name = name.removeprefix("functions.").rpartition(":")[0] or name
        yield from reader.skip_space()
        is_fenced = False
        if (yield from reader.peek()) != "{":  # DeepSeek V3's: the kind of tool comes first
            line, _ = yield from reader.until(("\n",), LONGEST_NAME)
            name = line.strip()
            is_fenced = yield from reader.optional("```json")
            yield from reader.skip_space()
        yield from read_arguments(reader, calls, name, call_id)
        yield from reader.skip_space()
        if is_fenced:
            yield from reader.close("```")
            yield from reader.skip_space()
        yield from reader.close(self.call_end)


DEEPSEEK: Final = Section(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
KIMI: Final = Section(
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)

# --------------------------------------------------------------------------- Mistral


_CALL_ID: Final = "[CALL_ID]"
_ARGS: Final = "[ARGS]"


def _read_mistral(reader: Reader, calls: Calls, _: str) -> Steps[None]:
    """Read a list of calls, or, from newer models, one call: its name, an id or none, and the arguments."""
    yield from reader.skip_space()
    if (yield from reader.peek()) == "[":
        yield from read_list(reader, calls)
        return
    name, end = yield from reader.until((_CALL_ID, _ARGS, "{"), LONGEST_NAME)
    call_id = None
    if end == _CALL_ID:
        call_id, end = yield from reader.until((_ARGS, "{"), LONGEST_NAME)
    if end == "{":
        reader.position -= 1
    yield from reader.skip_space()
    yield from read_arguments(reader, calls, name.strip(), call_id)


MISTRAL: Final = ToolFormat(("[TOOL_CALLS]",), _read_mistral, markers=(_CALL_ID, _ARGS), short_ids=True)

# --------------------------------------------------------------------------- parameters one by one


_TOOL_CALL: Final = "<tool_call>"
_TOOL_CALL_END: Final = "</tool_call>"
_FUNCTION: Final = "<function="
_FUNCTION_END: Final = "</function>"
_PARAMETER: Final = "<parameter="
_PARAMETER_ENDS: Final = ("\n</parameter>", "</parameter>")
_KEY: Final = "<arg_key>"
_KEY_END: Final = "</arg_key>"
_VALUE: Final = "<arg_value>"
_VALUE_END: Final = "</arg_value>"


def _read_qwen3_coder(reader: Reader, calls: Calls, marker: str) -> Steps[None]:
    """Read `<function=name><parameter=key>value</parameter>…</function>`, in `<tool_call>` or alone."""
    if marker == _TOOL_CALL:
        yield from reader.skip_space()
        yield from reader.expect(_FUNCTION)
    while True:
        name, _ = yield from reader.until((">",), LONGEST_NAME)
        arguments = _Arguments(reader, calls, name.strip())
        while True:
            yield from reader.skip_space()
            if (yield from reader.one_of(_FUNCTION_END, _PARAMETER)) == _FUNCTION_END:
                break
            key, _ = yield from reader.until((">",), LONGEST_NAME)
            yield from reader.optional("\n")
            yield from arguments.read(key.strip(), _PARAMETER_ENDS)
        arguments.end()
        yield from reader.skip_space()
        if not (yield from reader.optional(_FUNCTION)):
            break
    yield from reader.close(_TOOL_CALL_END)


def _read_glm(reader: Reader, calls: Calls, _: str) -> Steps[None]:
    """Read `name<arg_key>key</arg_key><arg_value>value</arg_value>…</tool_call>`."""
    name, end = yield from reader.until((_KEY, _TOOL_CALL_END), LONGEST_NAME)
    if "\n" in name.strip():
        raise Malformed
    arguments = _Arguments(reader, calls, name.strip())
    while end == _KEY:
        key, _ = yield from reader.until((_KEY_END,), LONGEST_NAME)
        yield from reader.skip_space()
        yield from reader.expect(_VALUE)
        yield from arguments.read(key.strip(), (_VALUE_END,))
        yield from reader.skip_space()
        end = yield from reader.one_of(_KEY, _TOOL_CALL_END)
    arguments.end()


QWEN3_CODER: Final = ToolFormat(
    (_TOOL_CALL, _FUNCTION),
    _read_qwen3_coder,
    markers=(_TOOL_CALL_END, _FUNCTION_END, "</parameter>"),
)
GLM: Final = ToolFormat(
    (_TOOL_CALL,), _read_glm, markers=(_TOOL_CALL_END, _KEY, _KEY_END, _VALUE, _VALUE_END)
)


class _Arguments:
    """Makes the JSON object of a call's parameters, which come one by one as texts."""

    def __init__(self, reader: Reader, calls: Calls, name: str) -> None:
        """Begin the call. Raises Malformed if there cannot be one of this name."""
        self._reader = reader
        self._calls = calls
        parameters = calls.tools.get(name, {}).get("properties")
        self._schemas: Mapping[str, Any] = parameters if isinstance(parameters, Mapping) else {}
        self._count = 0
        calls.begin(name)

    def read(self, key: str, ends: tuple[str, ...]) -> Steps[None]:
        """Read a value up to its end. Text is given as it comes, other values once they are complete."""
        give = self._calls.arguments
        give(f"{', ' if self._count else '{'}{written(key)}: ")
        self._count += 1
        types = parameter_types(self._schemas.get(key))
        if types == {"string"} or not types:
            give('"')
            end = yield from self._reader.pass_until(ends, lambda text: give(written(text)[1:-1]))
            if end is None:
                raise CutOff
            give('"')
        else:
            text, _ = yield from self._reader.until(ends, MOST_HELD)
            give(_typed(text, types))

    def end(self) -> None:
        """End the call."""
        self._calls.arguments("}" if self._count else "{}")
        self._calls.end()


def parameter_types(schema: Any) -> set[str]:
    """Return the types that a JSON schema allows; none if it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    found: set[str] = set()
    types = schema.get("type")
    for name in types if isinstance(types, list) else [types]:
        if isinstance(name, str):
            found.add(name)
    for keyword in ("anyOf", "oneOf"):
        branches = schema.get(keyword)
        for branch in branches if isinstance(branches, list) else []:
            found |= parameter_types(branch)
    return found


_WORDS: Final = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}


def _typed(text: str, types: set[str]) -> str:
    """Return the value that a text has for these types, as JSON: a text, if it is none of the other types."""
    stripped = text.strip()
    value: Any = text
    try:
        value = _WORDS[stripped] if stripped in _WORDS else json.loads(stripped, strict=False)
        found = written(value)
    except (ValueError, RecursionError):
        return written(text)
    kinds: dict[type, set[str]] = {
        bool: {"boolean"},
        int: {"integer", "number"},
        float: {"number"},
        list: {"array"},
        dict: {"object"},
        type(None): {"null"},
    }
    fits = not kinds.get(type(value), set()).isdisjoint(types)
    return found if fits or ("string" not in types and not isinstance(value, str)) else written(text)
