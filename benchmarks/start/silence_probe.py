"""Asks `/live` again and again on one connection: `python -m benchmarks.start.silence_probe URL [PAUSE_S]`.

For each line on its standard input it prints the longest time from a question to its answer since the last
line, in seconds.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Final

PAUSE_S: Final = 0.005
"""Time from an answer to the next question, unless the command line says another."""
QUESTION: Final = b"GET /live HTTP/1.1\r\nHost: bench\r\n\r\n"


class Probe:
    """The connection, and the longest silence on it."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._longest_s = 0.0
        self._asked_at: float | None = None

    async def run(self, host: str, port: int) -> None:
        """Send requests until it is cancelled."""
        reader, writer = await asyncio.open_connection(host, port)
        while True:
            self._asked_at = time.perf_counter()
            writer.write(QUESTION)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            self._longest_s = max(self._longest_s, time.perf_counter() - self._asked_at)
            self._asked_at = None
            await asyncio.sleep(self._pause_s)

    def pop_longest_s(self) -> float:
        """Return the longest silence since the last call, in seconds. A silence that still lasts counts."""
        now = time.perf_counter()
        longest_s = max(self._longest_s, 0.0 if self._asked_at is None else now - self._asked_at)
        self._longest_s = 0.0
        return longest_s


async def main(url: str, pause_s: float) -> None:
    """Send requests, and print the silences, until the input ends."""
    host, _, port = url.rpartition("/")[2].rpartition(":")
    probe = Probe(pause_s)
    asking = asyncio.create_task(probe.run(host, int(port)))
    while await asyncio.to_thread(sys.stdin.readline):
        print(probe.pop_longest_s(), flush=True)
        if asking.done():
            asking.result()
    asking.cancel()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else PAUSE_S))
