"""The load generator of suite `frontend`: the same for all sides, and as cheap as Python allows.

`python -m benchmarks.frontend.caller MODEL_DIRECTORY SEED`, then one JSON object a line on standard input for
each load (`Load`). It answers with three lines: `measuring` when the warm-up has ended, `measured` when the
time has, and the figures as JSON when the last answer is complete.

Each connection is a bare protocol on uvloop that sends the next chat as soon as it has the whole answer of
the last. It looks for the first token and for the end, and parses nothing; an answer must report the number
of its tokens. Bodies are made before the load begins.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import uvloop

from benchmarks.frontend.prompts import Prompts

OK: Final = b"HTTP/1.1 200 "
FIRST_CONTENT: Final = b'"content":"'
END_OF_BODY: Final = b"\r\n0\r\n\r\n"
MOST_PER_S: Final = 4000
"""More requests a second than any side answers: for so many, bodies are made ahead."""
ANSWER_S: Final = 20.0
TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Return the weather of a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]


@dataclass(frozen=True, slots=True)
class Load:
    """Chats that keep `concurrency` connections busy for `seconds`, after a warm-up of `warm_s`."""

    port: int
    model: str
    concurrency: int = 32
    seconds: float = 4.0
    warm_s: float = 1.0
    prompt_tokens: int = 200
    answer_tokens: int = 64
    most_requests: int = 0
    """Bodies to make ahead; 0: enough for the time."""
    has_tools: bool = False

    def as_line(self) -> str:
        """Return the load as a line for the caller."""
        return json.dumps(asdict(self))

    def body(self, prompt: str) -> bytes:
        """Return the request of a prompt, head and body. All servers get the same: they answer with exactly
        `answer_tokens`, and report that number at the end."""
        content = json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": self.answer_tokens,
                "min_tokens": self.answer_tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                **({"tools": TOOLS} if self.has_tools else {}),
            }
        ).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content


class Running:
    """A load that is under way: the bodies that are left, and the figures so far."""

    def __init__(self, load: Load, bodies: list[bytes]) -> None:
        self.load = load
        self.bodies = bodies
        self.usage = f'"completion_tokens":{load.answer_tokens}'.encode()
        self.stopping = False
        self.measuring = False
        self.answer_count = 0
        self.first_tokens_s: list[float] = []
        self.failure: str | None = None

    def fail(self, reason: str) -> None:
        """Note the first failure; it ends the load."""
        self.failure = self.failure or reason
        self.stopping = True


class Chat(asyncio.Protocol):
    """One connection, one chat at a time."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._transport: asyncio.Transport | None = None
        self._pieces: list[bytes] = []
        self._sent_at = 0.0
        self._waits_for_first = False
        self.ended = asyncio.get_running_loop().create_future()

    @property
    def received(self) -> bytes:
        """The part of the present answer that has come."""
        return b"".join(self._pieces)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first chat."""
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end; it is a failure while an answer is due."""
        if not self.ended.done():
            self._running.fail(f"a connection was lost within an answer: {exc}")
            self.ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Keep a piece of the answer; at its end, check it and send the next chat."""
        self._pieces.append(data)
        if self._waits_for_first:
            self._read_first()
        end = data if len(data) >= len(END_OF_BODY) else b"".join(self._pieces[-len(END_OF_BODY) :])
        if end.endswith(END_OF_BODY):
            self._finish()

    def _send(self) -> None:
        running = self._running
        assert self._transport is not None
        if running.stopping or not running.bodies:
            running.stopping = True
            self.ended.set_result(None)
            self._transport.close()
            return
        self._waits_for_first = True
        self._pieces.clear()
        self._sent_at = time.perf_counter()
        self._transport.write(running.bodies.pop())

    def _read_first(self) -> None:
        """Look for the first token, behind the head and an event with the role."""
        received = self.received
        if not OK.startswith(received[: len(OK)]):
            self._running.fail(f"a chat failed: {received[:500]!r}")
            assert self._transport is not None
            self._transport.close()
        place = received.find(FIRST_CONTENT)
        while place >= 0:
            begin = place + len(FIRST_CONTENT)
            if received[begin : begin + 1] not in (b"", b'"'):
                self._waits_for_first = False
                if self._running.measuring:
                    self._running.first_tokens_s.append(time.perf_counter() - self._sent_at)
                return
            place = received.find(FIRST_CONTENT, begin)

    def _finish(self) -> None:
        running, received = self._running, self.received
        if running.usage not in received or b"[DONE]" not in received or self._waits_for_first:
            running.fail(f"an answer is not whole: {received[-500:]!r}")
        if running.measuring:
            running.answer_count += 1
        self._send()


async def put_on(load: Load, prompts: Prompts) -> dict[str, Any]:
    """Put a load on; return its figures. Raises RuntimeError if a chat fails."""
    count = load.most_requests or round(MOST_PER_S * (load.seconds + load.warm_s))
    running = Running(load, [load.body(prompts.make(load.prompt_tokens)) for _ in range(count)])
    loop = asyncio.get_running_loop()
    chats: list[Chat] = []
    for number in range(
        load.concurrency
    ):  # spread over half of the warm-up, so that answers do not end alike
        _, chat = await loop.create_connection(lambda: Chat(running), "127.0.0.1", load.port)
        chats.append(chat)
        await asyncio.sleep(load.warm_s / 2 / load.concurrency if number + 1 < load.concurrency else 0)
    await _while_running(running, load.warm_s / 2)
    print("measuring", flush=True)
    running.measuring = True
    began, cpu = time.perf_counter(), time.process_time()
    await _while_running(running, load.seconds)
    running.measuring = False
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    print("measured", flush=True)
    running.stopping = True
    _, hanging = await asyncio.wait([chat.ended for chat in chats], timeout=ANSWER_S)
    if hanging:
        received = next(chat.received for chat in chats if not chat.ended.done())
        running.fail(f"{len(hanging)} answers have no end; one of them: {received[-500:]!r}")
    if running.failure:
        raise RuntimeError(running.failure)
    times = sorted(running.first_tokens_s)
    return {
        "seconds": took_s,
        "answers": running.answer_count,
        "cpu_s": cpu_s,
        "first_token_p50_ms": 1e3 * times[len(times) // 2] if times else None,
        "first_token_p99_ms": 1e3 * times[len(times) * 99 // 100] if times else None,
    }


async def _while_running(running: Running, seconds: float) -> None:
    """Wait for a time, or until all bodies are sent or a chat has failed."""
    until = time.perf_counter() + seconds
    while not running.stopping and (left := until - time.perf_counter()) > 0:
        await asyncio.sleep(min(left, 0.05))


def main() -> None:
    """Put on a load for each line that is read."""
    prompts = Prompts(Path(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        load = Load(**json.loads(line))
        print(json.dumps(uvloop.run(put_on(load, prompts))), flush=True)


if __name__ == "__main__":
    main()
