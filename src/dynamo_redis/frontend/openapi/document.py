"""Builds the OpenAPI document (3.1) of an application from its routes and the types of its bodies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, Final

from pydantic import TypeAdapter
from starlette.routing import BaseRoute, Route

from dynamo_redis.config import FrontendSettings
from dynamo_redis.frontend.apis import errors_of
from dynamo_redis.frontend.forms.messages import ANTHROPIC_ERRORS, OVERLOADED
from dynamo_redis.frontend.openapi.answers import AnthropicErrorAnswer, ErrorAnswer
from dynamo_redis.frontend.openapi.operations import EVENTS, JSON, OPERATIONS, Operation
from dynamo_redis.frontend.options import CheckedBody
from dynamo_redis.frontend.parameters import NVEXT, STREAM_OPTIONS, Parameters

OPENAPI_PATH: Final = "/openapi.json"
_REFERENCE: Final = "#/components/schemas/"

_DESCRIPTION: Final = """\
HEAD is answered wherever GET is, and OPTIONS with 204. Null is the same as an absent parameter. A request \
that is no HTTP, or that comes too slowly, is refused in OpenAI's form on each path. A stream that has begun \
ends with an event in place of an error's status."""

_SCHEMES: Final[Mapping[str, Mapping[str, str]]] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "password": {"type": "http", "scheme": "basic", "description": "The key as password, to read only"},
}

_FURTHER: Final[Mapping[str, Parameters]] = {"Extensions": NVEXT, "StreamOptions": STREAM_OPTIONS}
"""The parameters of objects within bodies that are no fields of theirs."""


def document_bytes(routes: Iterable[BaseRoute], settings: FrontendSettings) -> bytes:
    """Return the document of an application with these routes, as JSON."""
    schemas = _Schemas()
    needs_keys = settings.http_api_key is not None or settings.http_api_key_file is not None
    open_paths = settings.http_open_paths.split(",")
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if not isinstance(route, Route):
            continue
        path = route.path.replace(":path}", "}")
        for method in sorted((route.methods or set()) - {"HEAD"}):
            described = _describe(OPERATIONS[method, path], method, path, settings.overload_status, schemas)
            if needs_keys and route.path not in open_paths:
                described["security"] = [
                    {name: []} for name in _SCHEMES if name != "password" or method == "GET"
                ]
                described["responses"]["401"] = _refusal(path, 401, schemas)
            paths.setdefault(path, {})[method.lower()] = described
    components: dict[str, Any] = {"schemas": schemas.found}
    if needs_keys:
        components["securitySchemes"] = _SCHEMES
    info = {
        "title": "dynamo-redis frontend",
        "version": version("dynamo-redis"),
        "description": _DESCRIPTION,
    }
    document = {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}
    return json.dumps(document, ensure_ascii=False).encode()


def _describe(
    operation: Operation, method: str, path: str, overload_status: int, schemas: _Schemas
) -> dict[str, Any]:
    responses: dict[str, Any] = {
        str(status): {
            "description": HTTPStatus(status).phrase,
            "content": {media: schemas.content(media, kind) for media, kind in content.items()},
        }
        for status, content in operation.answers.items()
    }
    statuses = set(operation.errors)
    if operation.takes_place:
        statuses.add(OVERLOADED if errors_of(path) is ANTHROPIC_ERRORS else overload_status)
    for status in sorted(statuses):
        responses.setdefault(str(status), _refusal(path, status, schemas))
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": responses,
    }
    if "{model}" in path:
        described["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if operation.body is not None:
        content = schemas.content(JSON, operation.body)
        if operation.example is not None:
            content["example"] = operation.example
        described["requestBody"] = {"required": operation.needs_body, "content": {JSON: content}}
    return described


def _refusal(path: str, status: int, schemas: _Schemas) -> dict[str, Any]:
    """Return the response of an error, in the form of the path's API."""
    kind: Any = AnthropicErrorAnswer if errors_of(path) is ANTHROPIC_ERRORS else ErrorAnswer
    if path.startswith("/v1/models/") and status != 401:
        kind = ErrorAnswer | AnthropicErrorAnswer
    phrase = "Overloaded" if status == OVERLOADED else HTTPStatus(status).phrase
    return {"description": phrase, "content": {JSON: schemas.content(JSON, kind)}}


class _Schemas:
    """The schemas of the document, by name."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def content(self, media: str, kind: Any) -> dict[str, Any]:
        """Return the description of content of a type. Events have no schema: OpenAPI 3.1 has none for the
        items of a stream."""
        if media == EVENTS:
            return {}
        if kind is None:
            return {"schema": {} if media == JSON else {"type": "string"}}
        return {"schema": self._add(kind)}

    def _add(self, kind: Any) -> dict[str, Any]:
        """Return the schema of a type. Types within a body have its name before theirs: types of several
        APIs have the same names."""
        name = getattr(kind, "__name__", "")
        is_body = isinstance(kind, type) and issubclass(kind, CheckedBody)
        prefix = f"{name}." if is_body else ""
        schema = TypeAdapter(kind).json_schema(ref_template=f"{_REFERENCE}{prefix}{{model}}")
        for inner, definition in schema.pop("$defs", {}).items():
            if is_body and inner in _FURTHER:
                _close(definition, _FURTHER[inner])
            self.found[prefix + inner] = definition
        if not name:
            return schema
        if is_body:
            _close(schema, kind.further_parameters)
        self.found[name] = schema
        return {"$ref": _REFERENCE + name}


def _close(schema: dict[str, Any], further: Parameters) -> None:
    """Add the parameters that are no fields, with the values that are accepted, and permit no others."""
    properties = schema.setdefault("properties", {})
    for name, meaning in further.harmless.items():
        properties.setdefault(name, {"description": f"Changes nothing: {meaning}."})
    for name, refusal in further.refused.items():
        if refusal.neutral:
            accepted = [*refusal.neutral, None]
            properties.setdefault(
                name, {"enum": accepted, "description": f"Other values are refused: {refusal.reason}."}
            )
    schema["additionalProperties"] = False
