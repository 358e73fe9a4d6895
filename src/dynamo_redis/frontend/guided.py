"""The form of an answer (guided decoding), from all fields in which a body can ask for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from pydantic_core import from_json

from dynamo_redis.frontend.http.errors import invalid
from dynamo_redis.frontend.parameters import (
    JSON_SCHEMA,
    RESPONSE_FORMAT,
    STRUCTURED_OUTPUTS,
    Parameters,
    unsupported,
)
from dynamo_redis.models.llm_protocol import GuidedDecoding
from dynamo_redis.wire.codec import pack

_ANY_OBJECT: Final = {"type": "object"}
_MOST_CHOICES: Final = 1024

GUIDED_FIELDS: Final = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}
"""The fields of a body that each ask for one form, and the form's name in the worker's request."""

FORM_FIELDS: Final = frozenset(
    {*GUIDED_FIELDS, "guided_whitespace_pattern", "response_format", "structured_outputs", "nvext"}
)
"""All fields of a body that concern the form."""

JSON_SCHEMA_FIELDS: Final = ("name", "description", "schema", "strict")
"""The fields of `response_format.json_schema`. An answer follows the schema for any value of `strict`."""

STRUCTURED_FIELDS: Final = ("json", "regex", "choice", "grammar", "structural_tag", "whitespace_pattern")
ALL_STRUCTURED_FIELDS: Final = (*STRUCTURED_FIELDS, "json_object")
"""The fields of `structured_outputs`."""


class Guided(Protocol):
    """A body. Besides these fields, `GUIDED_FIELDS` are read."""

    response_format: dict[str, Any] | None
    structured_outputs: dict[str, Any] | None
    guided_whitespace_pattern: str | None

    @property
    def nvext(self) -> Any: ...


def guided_decoding(body: Guided) -> GuidedDecoding | None:
    """Return the form that is asked for, or None. Raises ApiError for a malformed or a second one."""
    wanted = [*_from_fields(body, ""), *_from_format(body.response_format)]
    if body.nvext is not None:
        wanted += _from_fields(body.nvext, "nvext.")
    wanted += _from_structured(body.structured_outputs or {})
    forms = [(param, kind, value) for param, kind, value in wanted if kind != "whitespace_pattern"]
    if len(forms) > 1:
        names = " and ".join(f"'{param}'" for param, _, _ in forms[:2])
        raise invalid(f"An answer has one form, but {names} each ask for one.", forms[1][0])
    if wanted and not forms:
        raise invalid("A white-space pattern needs a JSON schema, and none is given.", wanted[0][0])
    guided: dict[str, Any] = {}
    for param, kind, value in wanted:
        if kind == "whitespace_pattern" and forms[0][1] != "json":
            raise invalid("A white-space pattern needs a JSON schema, and none is given.", param)
        guided[kind] = _CHECKS[kind](value, param)
    return GuidedDecoding(**guided) if guided else None  # type: ignore[typeddict-item]


_Wanted = Iterator[tuple[str, str, Any]]


def _from_fields(holder: object, at: str) -> _Wanted:
    for name, kind in (*GUIDED_FIELDS.items(), ("guided_whitespace_pattern", "whitespace_pattern")):
        value = getattr(holder, name, None)
        if value is not None:
            yield at + name, kind, value


def _from_format(wanted: Mapping[str, Any] | None) -> _Wanted:
    if wanted is None:
        return
    kind = wanted.get("type", "text")
    if kind in ("text", "json_object", "json_schema"):
        fields = ("type", "json_schema") if kind == "json_schema" else ("type",)
        _check_further(RESPONSE_FORMAT, wanted, fields, "response_format.")
    if kind == "text":
        return
    if kind == "json_object":
        yield "response_format", "json", _ANY_OBJECT
    elif kind == "json_schema":
        described = wanted.get("json_schema")
        if not isinstance(described, Mapping) or described.get("schema") is None:
            raise invalid(
                "Missing required parameter: 'response_format.json_schema.schema'.",
                "response_format.json_schema.schema",
                "missing_required_parameter",
            )
        _check_further(JSON_SCHEMA, described, JSON_SCHEMA_FIELDS, "response_format.json_schema.")
        yield "response_format.json_schema.schema", "json", described["schema"]
    elif kind == "structural_tag":
        yield "response_format", "structural_tag", wanted
    else:
        raise unsupported(
            "response_format.type", "it is one of text, json_object, json_schema and structural_tag"
        )


def _from_structured(wanted: Mapping[str, Any]) -> _Wanted:
    at = "structured_outputs."
    for name in STRUCTURED_FIELDS:
        if wanted.get(name) is not None:
            yield at + name, name, wanted[name]
    if any_object := wanted.get("json_object"):
        if any_object is not True:
            raise invalid(f"Invalid value for '{at}json_object': it is true or false.", f"{at}json_object")
        yield f"{at}json_object", "json", _ANY_OBJECT
    _check_further(STRUCTURED_OUTPUTS, wanted, ALL_STRUCTURED_FIELDS, at)


def _check_further(known: Parameters, given: Mapping[str, Any], fields: Sequence[str], at: str) -> None:
    known.check({name: value for name, value in given.items() if name not in fields}, fields, at)


# --------------------------------------------------------------------------- checks


def json_object(value: object, param: str) -> dict[str, Any]:
    """Return a JSON object, given as such or as its text. Raises ApiError."""
    if isinstance(value, str):
        try:
            value = from_json(value)
        except ValueError as exc:
            raise invalid(f"Invalid value for '{param}': it is not JSON: {exc}.", param) from exc
    if not isinstance(value, dict):
        raise invalid(f"Invalid value for '{param}': it must be a JSON object.", param)
    try:
        json.dumps(value, allow_nan=False)
        pack(value)
    except (ValueError, TypeError) as exc:  # infinity; an integer over 64 bits; a nesting too deep
        raise invalid(f"Invalid value for '{param}': it cannot be sent to a worker: {exc}.", param) from exc
    return value


def _text(value: object, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise invalid(f"Invalid value for '{param}': it must be a string, and not empty.", param)
    return value


def _choices(value: object, param: str) -> list[str]:
    if not isinstance(value, list) or not 0 < len(value) <= _MOST_CHOICES:
        raise invalid(
            f"Invalid value for '{param}': it must be a list of 1 to {_MOST_CHOICES} strings.", param
        )
    return [_text(choice, f"{param}[{index}]") for index, choice in enumerate(value)]


_CHECKS: Final[Mapping[str, Callable[[object, str], Any]]] = {
    "json": json_object,
    "regex": _text,
    "choice": _choices,
    "grammar": _text,
    "structural_tag": json_object,
    "whitespace_pattern": _text,
}
