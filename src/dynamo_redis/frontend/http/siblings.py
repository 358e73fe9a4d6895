"""Frontend processes on one port, and the metrics of all of them.

A scrape of the port, and a browser that looks at the dashboard, reach one process, which asks all. Each also
listens on a unix socket in a directory that they share, under its process id. Only their user can reach it. A
process that has died, or does not answer in time, is left out.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo_redis.exposition import CONTENT_TYPE

ANSWER_S: Final = 2.0
MOST_ANSWER_BYTES: Final = 16 << 20
_NAME: Final = re.compile(r"[^{ ]+")
_REQUEST: Final = b"GET %s HTTP/1.0\r\nHost: sibling\r\n\r\n"


@contextmanager
def sibling_socket(directory: Path) -> Iterator[socket.socket]:
    """Yield this process's own socket in the directory, bound. It is removed afterwards."""
    path = directory / str(os.getpid())
    path.unlink(missing_ok=True)  # of a process that was killed, whose id came again
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.setblocking(False)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


async def all_metrics(directory: Path) -> str:
    """Return the metrics of all processes in one text."""
    texts = await ask_siblings(directory, "/metrics")
    return merge({process: text for process, text in texts.items() if text is not None})


async def ask_siblings(directory: Path, target: str, *, without: str | None = None) -> dict[str, str | None]:
    """Return the answers of all living processes, but for one, by their ids; None for one that does not
    answer in time, or not as it should."""
    paths = [path for path in _sockets(directory) if path.name != without]
    responses = await asyncio.gather(*(_ask(path, target.encode()) for path in paths))
    return {
        path.name: _content(response)
        for path, response in zip(paths, responses, strict=True)
        if response is not None
    }


async def answers(directory: Path, process: int) -> bool:
    """Return False if a process is silent: it answers nothing in time, not even with a refusal.

    That it cannot be asked, since its socket is gone or this process has no file left, says nothing of it.
    """
    try:
        await _get(directory / str(process), b"/live")
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def with_all_metrics(app: ASGIApp, directory: Path) -> ASGIApp:
    """Wrap an application: `GET /metrics` has the metrics of all processes."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != "/metrics" or scope["method"] not in ("GET", "HEAD"):
            await app(scope, receive, send)
            return
        response = Response(await all_metrics(directory), media_type=CONTENT_TYPE)
        await response(scope, receive, send)

    return serve


def apart_from_siblings(app: ASGIApp, own: ASGIApp) -> ASGIApp:
    """Wrap an application: requests of the other processes go to `own`, which writes no access lines."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        is_sibling = scope["type"] == "http" and _is_sibling(scope)
        await (own if is_sibling else app)(scope, receive, send)

    return serve


def merge(texts: Mapping[str, str]) -> str:
    """Join Prometheus texts by metric. Each sample gets its process's id as the label `pid`.

    So the counters of each process stay series of their own: `sum` adds them, and `rate` sees the restart of
    one process as such.
    """
    metrics: dict[str, dict[str, None]] = {}
    for process, text in sorted(texts.items()):
        lines: dict[str, None] = {}
        for line in text.splitlines():
            if line.startswith("#"):
                lines = metrics.setdefault(line.split(" ", 3)[2], {})
                lines[line] = None  # the same for each process
            else:
                lines[_labelled(line, process)] = None
    return "".join(f"{line}\n" for lines in metrics.values() for line in lines)


def _labelled(sample: str, process: str) -> str:
    name = _NAME.match(sample)
    if name is None:
        return sample
    rest = sample[name.end() :]
    label = f'{{pid="{process}"'
    return f"{name[0]}{label},{rest[1:]}" if rest.startswith("{") else f"{name[0]}{label}}}{rest}"


def _is_sibling(scope: Mapping[str, Any]) -> bool:
    """Return whether a request came through a unix socket: its address has no port."""
    server = scope.get("server")
    return server is None or server[1] is None


def _sockets(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:  # removed, since the processes end
        return []


def _content(response: bytes) -> str | None:
    """Return the body of a response with status 200, else None."""
    head, _, body = response.partition(b"\r\n\r\n")
    with suppress(ValueError):
        if b" 200 " in head.partition(b"\r\n")[0]:
            return body.decode()
    return None


async def _ask(path: Path, what: bytes) -> bytes | None:
    """Return a process's response; empty if it does not answer in time, None if it is dead."""
    try:
        return await _get(path, what)
    except (ConnectionRefusedError, FileNotFoundError):
        return None
    except OSError:  # TimeoutError is one
        return b""


async def _get(path: Path, what: bytes) -> bytes:
    """Return a process's response. Raises TimeoutError, or another OSError if it cannot be asked."""
    content = bytearray()
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(_REQUEST % what)
            while (piece := await reader.read(64 << 10)) and len(content) <= MOST_ANSWER_BYTES:
                content += piece
        finally:
            writer.close()
    return bytes(content)
