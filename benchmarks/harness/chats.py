"""Chats through a frontend, by a client that uses little CPU."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx

TOKENS = 16
LATE_S = 30.0
"""Time after which a chat without an answer has failed."""
IDLE_S = 2.0


def first_model(url: str, patience_s: float) -> str:
    """Return the name of the first model of the frontend as soon as there is one. Raises RuntimeError after
    `patience_s`."""
    deadline = time.perf_counter() + patience_s
    while time.perf_counter() < deadline:
        try:
            models = httpx.get(f"{url}/v1/models", timeout=1).json()["data"]
            if models:
                return str(models[0]["id"])
        except (httpx.TransportError, ValueError, KeyError):  # it is not up, or has no list yet
            pass
        time.sleep(0.01)
    raise RuntimeError(f"no model within {patience_s} s")


def chat_body(model: str, text: str, *, stream: bool) -> dict[str, Any]:
    """Return the JSON body of a short chat."""
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": TOKENS, "stream": stream}


class Chatter:
    """One kept connection to a frontend, for one chat at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, url: str) -> Chatter:
        """Connect to `http://host:port`."""
        host, _, port = url.rpartition("/")[2].rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def chat(self, model: str, text: str) -> None:
        """Send a chat and read the whole answer. Raises RuntimeError for any status but 200."""
        body = json.dumps(chat_body(model, text, stream=False)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"a chat failed: {answer[:80]!r}")
        length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await self._reader.readexactly(int(length.partition(b":")[2]))

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


class CountedChats:
    """Chats at a fixed pace. Each uses a kept connection that is free, or a new one.

    A server may close an idle connection at the moment in which a request is sent. So connections that have
    been idle for `IDLE_S` are not used again, as careful clients do it.
    """

    def __init__(self, url: str, model: str, label: str) -> None:
        """`label`: shown before the errors of chats."""
        self._url = url
        self._model = model
        self._label = label
        self._free: list[tuple[float, Chatter]] = []

    async def flow(self, count: int, per_s: float) -> int:
        """Send `count` chats, `per_s` a second; return the number that failed."""
        began = time.monotonic()
        chats: list[asyncio.Task[bool]] = []
        for number in range(count):
            await asyncio.sleep(max(0.0, began + number / per_s - time.monotonic()))
            chats.append(asyncio.create_task(self._is_answered(f"Question {began}-{number}?")))
        return (await asyncio.gather(*chats)).count(False)

    async def _is_answered(self, text: str) -> bool:
        try:
            async with asyncio.timeout(LATE_S):
                chatter = self._pop_fresh() or await Chatter.open(self._url)
                await chatter.chat(self._model, text)
        except (OSError, EOFError, RuntimeError) as exc:  # a time-out is an OSError
            print(f"{self._label}: a chat failed: {exc!r}", flush=True)
            return False
        self._free.append((time.monotonic(), chatter))
        return True

    def _pop_fresh(self) -> Chatter | None:
        while self._free:
            since, chatter = self._free.pop()
            if time.monotonic() - since < IDLE_S:
                return chatter
            chatter.close()
        return None

    def close(self) -> None:
        """Close all connections."""
        for _, chatter in self._free:
            chatter.close()
