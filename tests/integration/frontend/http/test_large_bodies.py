"""Bodies near the limit, which a process parses within a limit of memory."""

from __future__ import annotations

import json

from dynamo_redis.frontend.http.body_reader import BodyReader
from dynamo_redis.frontend.openai import ChatBody

LIMIT_BYTES = 16 << 20


async def test_image_as_large_as_a_body_is_read() -> None:
    """Also beside an emoji, for which Python would hold a joined text in four bytes a character."""
    url = "data:image/png;base64," + "A" * (LIMIT_BYTES - 1000)
    reader = BodyReader(LIMIT_BYTES)
    try:
        for text in ("Look:", "Look \N{GRINNING FACE}:"):
            parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
            given = {"model": "m", "messages": [{"role": "user", "content": parts}]}
            body = await reader.read(ChatBody, [bytearray(json.dumps(given, ensure_ascii=False).encode())])
            assert body.media is not None
            assert json.loads(bytes(body.media.chat["messages"])) == given["messages"]
    finally:
        await reader.aclose()
