"""An HTTP engine for row F10: it streams as vLLM does, has no model, and costs as little as Python allows.

`python -m benchmarks.frontend.rivals.fake_engine PORT MODEL_NAME TOKENIZER_JSON`. `/v1/completions` answers
prompts of token ids, with `token_ids` in each event if the request asks for them; `/v1/chat/completions`
answers conversations. Both give the same tokens, one event a step: each step writes the next event of every
answer. The events are made when the process starts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any, Final, cast

import httptools
import uvloop
from tokenizers import Tokenizer

from dynamo_redis.engines.text import sentences

TOKENS: Final = 64
HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


class Answers:
    """The events of each kind of answer, ready to be written: chunks of HTTP."""

    def __init__(self, model: str, tokenizer_path: str) -> None:
        tokenizer = Tokenizer.from_file(tokenizer_path)
        ids: list[int] = tokenizer.encode(" ".join(sentences()), add_special_tokens=False).ids
        ids = [token_id for token_id in ids if tokenizer.decode([token_id]).isascii()][:TOKENS]
        self._model = model
        self.with_ids = self._completions(tokenizer, ids, shows_ids=True)
        self.without_ids = self._completions(tokenizer, ids, shows_ids=False)
        self.chat = self._chat(tokenizer, ids)
        entry = {"id": model, "object": "model", "owned_by": "vllm", "max_model_len": 40960}
        self.models = _whole(json.dumps({"object": "list", "data": [entry]}).encode())
        self.health = _whole(b"")
        self.absent = _whole(b'{"detail":"Not Found"}', b"404 Not Found")

    def _completions(self, tokenizer: Tokenizer, ids: list[int], *, shows_ids: bool) -> list[bytes]:
        events = []
        for place, token_id in enumerate(ids):
            choice = {
                "index": 0,
                "text": tokenizer.decode([token_id]),
                "logprobs": None,
                "finish_reason": "length" if place == len(ids) - 1 else None,
                "stop_reason": None,
            }
            if shows_ids:
                choice |= {"token_ids": [token_id], "prompt_token_ids": None}
            events.append(self._event("cmpl", "text_completion", [choice], None))
        return [*events, self._event("cmpl", "text_completion", [], _usage(len(ids))), _END]

    def _chat(self, tokenizer: Tokenizer, ids: list[int]) -> list[bytes]:
        kind = ("chatcmpl", "chat.completion.chunk")
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        events = [self._event(*kind, [{**role, "finish_reason": None}], None)]
        for place, token_id in enumerate(ids):
            choice = {
                "index": 0,
                "delta": {"content": tokenizer.decode([token_id])},
                "logprobs": None,
                "finish_reason": "length" if place == len(ids) - 1 else None,
                "token_ids": None,
            }
            events.append(self._event(*kind, [choice], None))
        events[:2] = [events[0] + events[1]]  # the role comes with the first token
        return [*events, self._event(*kind, [], _usage(len(ids))), _END]

    def _event(self, prefix: str, kind: str, choices: list[Any], usage: dict[str, int] | None) -> bytes:
        body = {
            "id": f"{prefix}-0123456789abcdef0123456789abcdef", "object": kind, "created": int(time.time()),
            "model": self._model, "choices": choices,
        }  # fmt: skip
        if usage is not None:
            body["usage"] = usage
        data = b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
        return b"%x\r\n%b\r\n" % (len(data), data)


_END: Final = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def _usage(count: int) -> dict[str, int]:
    return {"prompt_tokens": 200, "total_tokens": 200 + count, "completion_tokens": count}


def _whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        status,
        len(body),
        body,
    )


class Steps:
    """Answers under way. One task writes the next event of each, then lets the loop turn once."""

    def __init__(self) -> None:
        self._answers: dict[Connection, list[bytes]] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, connection: Connection, events: list[bytes]) -> None:
        """Answer with these events, one a step."""
        self._answers[connection] = events[::-1]
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def remove(self, connection: Connection) -> None:
        """Forget an answer, if there is one."""
        self._answers.pop(connection, None)

    async def _run(self) -> None:
        while self._answers:
            await asyncio.sleep(0)
            for connection, events in list(self._answers.items()):
                connection.write(events.pop())
                if len(events) == 1:  # usage and end come together, as from vLLM
                    connection.write(events.pop())
                if not events:
                    self._answers.pop(connection, None)
        self._task = None


class Connection(asyncio.Protocol):
    """One kept connection."""

    def __init__(self, answers: Answers, steps: Steps) -> None:
        self._answers = answers
        self._steps = steps
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._path = b""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._steps.remove(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:  # a gateway that tries whether this engine knows HTTP/2
            assert self._transport is not None
            self._transport.close()

    def on_url(self, url: bytes) -> None:
        self._path = url.partition(b"?")[0]
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        answers = self._answers
        if self._path == b"/v1/completions":
            self.write(HEAD)
            shows_ids = b'"return_token_ids"' in self._body
            self._steps.add(self, answers.with_ids if shows_ids else answers.without_ids)
        elif self._path == b"/v1/chat/completions":
            self.write(HEAD)
            self._steps.add(self, answers.chat)
        elif self._path == b"/v1/models":
            self.write(answers.models)
        else:
            self.write(answers.health if self._path == b"/health" else answers.absent)

    def write(self, data: bytes) -> None:
        """Write to the caller, if it is still there."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


async def main(port: int, model: str, tokenizer_path: str) -> None:
    """Serve until the process is ended."""
    answers, steps = Answers(model, tokenizer_path), Steps()
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(answers, steps), "127.0.0.1", port
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
