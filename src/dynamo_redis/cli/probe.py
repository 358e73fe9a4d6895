"""Asks a frontend how it is, without an HTTP library: `up` must start fast."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 2.0
_ANSWER_LIMIT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """A status code and a JSON body; the body is None if it is not JSON."""

    status: int
    body: Any


async def get(url: str, path: str) -> Answer | None:
    """GET a path of a frontend; None if it does not answer within 2 s, or with more than 4 MiB.

    Speaks HTTP/1.0, so that the answer ends with the connection.
    """
    host, port = urlsplit(url).hostname, urlsplit(url).port
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(
                    f"GET {path} HTTP/1.0\r\nHost: {host}\r\nAccept: application/json\r\n\r\n".encode()
                )
                answer = await _read_all(reader)
            finally:
                writer.close()
    except (OSError, ValueError):  # TimeoutError is an OSError
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        status = int(head.split(None, 2)[1])
    except (IndexError, ValueError):
        return None
    return Answer(status, _json(body))


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    answer = bytearray()
    while piece := await reader.read(64 << 10):
        answer += piece
        if len(answer) > _ANSWER_LIMIT_BYTES:
            raise ValueError("the answer is too long")
    return bytes(answer)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
