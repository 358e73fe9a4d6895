"""Chats with a frontend as users have them: streamed, and failed at the first sign of trouble."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx

MODEL = "demo"
"""The model that mock engines serve by default."""


class ChatFailed(Exception):
    """The frontend refused the chat, or its answer ended with an error event, or too soon."""


async def chat(http: httpx.AsyncClient, prompt: str, max_tokens: int) -> AsyncIterator[str]:
    """Yield the pieces of a streamed answer. Raises ChatFailed."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                raise ChatFailed(f"{answer.status_code}: {(await answer.aread()).decode()}")
            is_done = False
            async for line in answer.aiter_lines():
                is_done = is_done or line == "data: [DONE]"
                if not line or is_done:
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ChatFailed(event["error"]["message"])
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        yield choice["delta"]["content"]
            if not is_done:
                raise ChatFailed("the answer ended without its last event")
    except httpx.HTTPError as exc:
        raise ChatFailed(f"{type(exc).__name__}: {exc}") from exc
