"""JSON values that fit a JSON schema, for answers of the mock engine: one value for each schema.

Source: JSON Schema 2020-12, the keywords that clients of structured outputs use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from dynamo_redis.errors import InvalidRequest

_KNOWN: Final = frozenset(
    (
        *(
            "type",
            "properties",
            "required",
            "additionalProperties",
            "items",
            "enum",
            "const",
            "anyOf",
            "oneOf",
        ),
        *("minItems", "maxItems", "minLength", "maxLength", "$ref", "$defs", "definitions"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("title", "description", "default", "examples", "$schema", "$id", "strict"),
    )
)
_MOST_DEPTH: Final = 32
_MOST_VALUES: Final = 4096
_MOST_CHARS: Final = 4096


def instance_text(schema: Mapping[str, Any]) -> str:
    """Return a JSON text that fits a schema. Raises InvalidRequest for one with further keywords."""
    try:
        return json.dumps(_Instances(schema).of(schema, "text", 0), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as exc:
        raise InvalidRequest("the mock engine cannot keep to this JSON schema: it is malformed") from exc


class _Instances:
    """Makes the values of one schema, of a bounded number."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._left = _MOST_VALUES

    def of(self, schema: Any, name: str, depth: int) -> Any:
        """Return a value that fits a schema. A text is the `name` of its member."""
        self._left -= 1
        if schema is True and self._left >= 0:
            return name
        if not isinstance(schema, Mapping) or depth > _MOST_DEPTH or self._left < 0:
            raise InvalidRequest("the mock engine cannot keep to this JSON schema: it is too large or broken")
        if further := schema.keys() - _KNOWN:
            raise InvalidRequest(f"the mock engine does not know {min(further)!r} in JSON schemas")
        if "const" in schema:
            return schema["const"]
        if values := schema.get("enum"):
            return values[0]
        if "$ref" in schema:
            return self.of(self._referenced(schema["$ref"]), name, depth + 1)
        if branches := schema.get("anyOf") or schema.get("oneOf"):
            return self.of(branches[0], name, depth + 1)
        return self._typed(schema, name, depth)

    def _typed(self, schema: Mapping[str, Any], name: str, depth: int) -> Any:
        types = schema.get("type") or ("object" if "properties" in schema else "string")
        match types[0] if isinstance(types, list) else types:
            case "object":
                properties = schema.get("properties") or {}
                names = schema.get("required", properties)
                return {key: self.of(properties.get(key, True), key, depth + 1) for key in names}
            case "array":
                count = schema.get("minItems", 0)
                return [self.of(schema.get("items", True), name, depth + 1) for _ in range(count)]
            case "string":
                least = min(schema.get("minLength", 0), _MOST_CHARS)
                return name.ljust(least, ".")[: schema.get("maxLength")]
            case "integer":
                return math.ceil(_number(schema, 1))
            case "number":
                return _number(schema, 0.5)
            case "boolean":
                return True
            case "null":
                return None
            case other:
                raise InvalidRequest(f"the mock engine does not know the JSON type {other!r}")

    def _referenced(self, reference: str) -> Any:
        found: Any = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            found = found[part.replace("~1", "/").replace("~0", "~")]
        return found


def _number(schema: Mapping[str, Any], step: float) -> float:
    """Return the least number that fits, else the one next to 0. `step` keeps off an exclusive bound."""
    least, most = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    least = max(least, schema.get("exclusiveMinimum", -math.inf) + step)
    most = min(most, schema.get("exclusiveMaximum", math.inf) - step)
    number: float = min(max(0, least), most)
    return number
