"""The control of a replay's processes: commands on standard input, JSON answers on standard output.

It ends with its standard input, and so with its parent.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any


async def commands() -> AsyncIterator[list[str]]:
    """Yield the words of each line, until `end` or the end of input."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while line := await reader.readline():
            words = line.decode().split()
            if words == ["end"]:
                return
            yield words
    finally:
        transport.close()


def answer(**fields: Any) -> None:
    """Send an answer to the parent process."""
    print(json.dumps(fields), flush=True)
