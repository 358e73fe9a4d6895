"""Requests that change the state of a deployment: not to be sent by a page that a browser shows.

A page of any site can have a browser send a POST to an address that the browser can reach, with a body of a
form's types. It cannot have it sent as `application/json` without the server's leave (CORS), which is never
given. Browsers say in `Origin` whose page it is.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from dynamo_redis.frontend.http.errors import ApiError, invalid
from dynamo_redis.frontend.http.request_body import ClientGone, read_limited

Handler = Callable[[Request], Awaitable[Response]]

_BODY_LIMIT_BYTES = 64 * 1024


def changes_state(handler: Handler) -> Handler:
    """Have a handler take only requests of type `application/json`, and from no other origin.

    Others get ApiError: 403 or 415. The body is empty or an object without members, else 400: there is
    nothing to choose.
    """

    async def guarded(request: Request) -> Response:
        _refuse_foreign(request)
        try:
            content = await read_limited(request.scope, request.receive, _BODY_LIMIT_BYTES)
        except ClientGone:
            return Response(status_code=400)
        _refuse_parameters(b"".join(content))
        return await handler(request)

    return guarded


def _refuse_foreign(request: Request) -> None:
    origin = request.headers.get("origin")
    if origin is not None and not _is_of(origin, request.headers.get("host")):
        raise ApiError(
            403, f"A page of {origin[:100]!r} may not change anything here.", code="foreign_origin"
        )
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(
            415,
            "This request changes state: send it with the header 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )


def _is_of(origin: str, host: str | None) -> bool:
    try:
        return bool(host) and urlsplit(origin).netloc == host
    except ValueError:  # brackets without an address
        return False


def _refuse_parameters(content: bytes) -> None:
    try:
        body: Any = json.loads(content) if content.strip() else {}
    except (ValueError, RecursionError) as exc:
        raise invalid("The request body is not valid JSON.", code="invalid_json") from exc
    if not isinstance(body, dict):
        raise invalid("The request body is not a JSON object.")
    if body:
        name = next(iter(body))[:64]
        raise invalid(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
