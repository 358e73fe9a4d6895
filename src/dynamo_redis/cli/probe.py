"""HTTP GET of a frontend, without an HTTP library: `up` must start fast."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 2.0
_RESPONSE_LIMIT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Response:
    """A status code and a JSON body; the body is None if it is not JSON."""

    status: int
    body: Any


async def get(url: str, path: str) -> Response | None:
    """GET a path of a frontend. Return None if it does not answer within 2 s, or answers over 4 MiB.

    It speaks HTTP/1.0: the response ends with the connection.
    """
    host, port = urlsplit(url).hostname, urlsplit(url).port
    content = bytearray()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(
                    f"GET {path} HTTP/1.0\r\nHost: {host}\r\nAccept: application/json\r\n\r\n".encode()
                )
                while piece := await reader.read(64 << 10):
                    content += piece
                    if len(content) > _RESPONSE_LIMIT_BYTES:
                        return None
            finally:
                writer.close()
    except (OSError, ValueError):  # TimeoutError is an OSError
        return None
    head, _, body = bytes(content).partition(b"\r\n\r\n")
    try:
        status = int(head.split(None, 2)[1])
    except (IndexError, ValueError):
        return None
    try:
        return Response(status, json.loads(body))
    except ValueError:
        return Response(status, None)
