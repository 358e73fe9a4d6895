"""Requests that change the state of a deployment, protected against pages of other sites in a browser.

A page of any site can make a browser send a POST to an address that the browser can reach, with a body of a
form's types. It cannot send `application/json` unless the server permits it (CORS), and this server never
does. The header `Origin` names the site of the page.
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
Change = Callable[[dict[str, Any]], Awaitable[Response]]
"""Makes a change that the members of a body ask for. Raises ApiError."""

_BODY_LIMIT_BYTES = 64 * 1024


def changes_state(change: Change) -> Handler:
    """Return the handler of a change: it takes only requests of type `application/json`, and of no other
    origin.

    Other requests get ApiError 403 or 415. The body must be empty or an object, else 400.
    """

    async def guarded(request: Request) -> Response:
        origin, host = request.headers.get("origin"), request.headers.get("host")
        if origin is not None:
            try:
                is_own = bool(host) and urlsplit(origin).netloc == host
            except ValueError:  # brackets without an address
                is_own = False
            if not is_own:
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
        try:
            content = b"".join(
                await read_limited(request.scope, request.receive, _BODY_LIMIT_BYTES, setting=None)
            )
        except ClientGone:
            return Response(status_code=400)
        try:
            body: Any = json.loads(content) if content.strip() else {}
        except (ValueError, RecursionError) as exc:
            raise invalid("The request body is not valid JSON.", code="invalid_json") from exc
        if not isinstance(body, dict):
            raise invalid("The request body is not a JSON object.")
        return await change(body)

    return guarded


def refuse_members(body: dict[str, Any]) -> None:
    """Raise ApiError 400 if a body has a member: the request has no parameters."""
    for name in body:
        raise invalid(f"Unknown parameter: '{name[:64]}'.", name[:64], "unknown_parameter")
