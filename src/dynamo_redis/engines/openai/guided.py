"""Guided decoding in the form of each kind of server. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dynamo_redis.engines.openai.dialects import Dialect, unknown_option
from dynamo_redis.errors import InvalidRequest
from dynamo_redis.models.llm_protocol import GUIDED_BY


def guided_fields(guided: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """Return the fields that guide an answer by a schema, an expression, a choice or a grammar.

    Raises InvalidRequest for a kind of guide that the server does not have.
    """
    given = {name: value for name, value in guided.items() if value is not None}
    if isinstance(given.get("structural_tag"), Mapping):
        given["structural_tag"] = json.dumps(given["structural_tag"])
    if dialect == "vllm":
        # Releases before 0.11 read the second form only, later ones the first; each ignores the other.
        return {"structured_outputs": given} | {f"guided_{name}": value for name, value in given.items()}
    fields: dict[str, Any] = {}
    for name, value in given.items():
        match dialect, name:
            case "sglang", "json":
                fields["json_schema"] = value if isinstance(value, str) else json.dumps(value)
            case "sglang", "regex" | "structural_tag":
                fields[name] = value
            case "sglang", "grammar":
                fields["ebnf"] = value
            case "sglang", "choice":
                fields["regex"] = "(" + "|".join(re.escape(choice) for choice in _texts(value)) + ")"
            case "llamacpp", "json":
                fields["json_schema"] = json.loads(value) if isinstance(value, str) else value
            case "llamacpp", "grammar":
                fields["grammar"] = value
            case "llamacpp", "choice":
                fields["grammar"] = "root ::= " + " | ".join(json.dumps(text) for text in _texts(value))
            case _:
                raise unknown_option(f"guided_decoding.{name} ({GUIDED_BY})", dialect)
    return fields


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise InvalidRequest("guided_decoding.choice must be a non-empty list of strings")
    return value
