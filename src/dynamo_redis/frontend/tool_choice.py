"""The tools of a request, and those that its answer has to call (`tool_choice`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_redis.frontend.guided import json_object
from dynamo_redis.frontend.http.errors import invalid
from dynamo_redis.frontend.parameters import unsupported
from dynamo_redis.models.llm_protocol import GuidedDecoding
from dynamo_redis.parsers.marked_calls import parameter_types

ToolChoice = str | dict[str, Any] | None
Tools = Sequence[Mapping[str, Any]] | None


def check_tool_choice(choice: ToolChoice, tools: Tools) -> None:
    """Raise ApiError for a choice that cannot be served with these tools."""
    if choice in (None, "auto", "none"):
        return
    if choice != "required" and not (isinstance(choice, dict) and choice.get("type") == "function"):
        raise unsupported("tool_choice", "it is one of auto, none and required, or names one function")
    if not tools:
        raise invalid("'tool_choice' demands a call, but there are no 'tools'.", "tool_choice")
    if choice != "required" and chosen_name(choice) not in {tool["function"]["name"] for tool in tools}:
        raise invalid(
            "'tool_choice' names a function that is not among the 'tools'.", "tool_choice.function.name"
        )


def must_call(choice: ToolChoice) -> bool:
    """Return whether the answer has to be a call."""
    return choice == "required" or isinstance(choice, dict)


def chosen_name(choice: ToolChoice) -> str | None:
    """Return the name of the one function that may be called, or None."""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def guided_calls(choice: ToolChoice, tools: Tools, *, one: bool) -> GuidedDecoding | None:
    """Return the form of an answer that has to call a tool: the arguments of the named function, or a list of
    calls, of `one` call if so wanted. None if it need not.

    Raises ApiError for a function whose parameters are no JSON schema, and for definitions of the same name
    that differ between functions.
    """
    if not must_call(choice) or not tools:
        return None
    schemas = {}
    definitions: dict[str, Any] = {}
    name = chosen_name(choice)
    for index, tool in enumerate(tools):
        function = tool["function"]
        if name is None or function["name"] == name:
            param = f"tools[{index}].function.parameters"
            schema = json_object(function.get("parameters") or {"type": "object", "properties": {}}, param)
            schemas[function["name"]] = schema
            if name is None:  # references count from the root of the schema
                _add_definitions(definitions, schema, param)
    if name is not None:
        return GuidedDecoding(json=schemas[name])
    calls = [
        {
            "type": "object",
            "properties": {"name": {"type": "string", "enum": [name]}, "parameters": schema},
            "required": ["name", "parameters"],
        }
        for name, schema in schemas.items()
    ]
    form = {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": calls}, **definitions}
    return GuidedDecoding(json={**form, "maxItems": 1} if one else form)


def _add_definitions(definitions: dict[str, Any], schema: Mapping[str, Any], param: str) -> None:
    """Add the definitions of a function's schema to those of all functions."""
    for keyword in ("$defs", "definitions"):
        if not isinstance(found := schema.get(keyword), dict):
            continue
        known = definitions.setdefault(keyword, {})
        for name, definition in found.items():
            if known.setdefault(name, definition) != definition:
                raise invalid(
                    f"Tools define {name[:64]!r} in different ways: where 'tool_choice' demands a call of "
                    "any tool, definitions of the same name must be the same.",
                    f"{param}.{keyword}",
                )


def typed_function(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return a function with its name and the types of its parameters alone."""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    typed = {}
    if isinstance(properties, Mapping):
        for name, schema in properties.items():
            types = parameter_types(schema)
            if types not in (set(), {"string"}):
                typed[name] = {"type": sorted(types)}
    return {"name": function["name"], "parameters": {"properties": typed}}
