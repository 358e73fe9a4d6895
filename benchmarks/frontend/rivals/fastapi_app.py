"""A frontend as it is usually written in Python: FastAPI on uvicorn, with a pydantic model a chunk.

`python -m benchmarks.frontend.rivals.fastapi_app PORT MODEL_DIRECTORY MODEL_NAME`, with the settings of
`DistributedRuntime` in the environment. It serves the same workers as the product's frontend, through
`Client.round_robin`; so the difference is the frontend alone. The tokenizer is `tokenizers`, with its own
`DecodeStream`; the template is rendered by Jinja2's sandbox, compiled once, as `transformers` does it.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from dynamo_redis.runtime import Client, DistributedRuntime

ENDPOINT: Final = "dynamo.backend.generate"


class Message(BaseModel):
    role: str
    content: str


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    model: str
    messages: list[Message]
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    temperature: float | None = None
    stream: bool = True
    stream_options: StreamOptions | None = None


class Delta(BaseModel):
    role: str | None = None
    content: str | None = None


class Choice(BaseModel):
    index: int = 0
    delta: Delta
    finish_reason: str | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Chunk(BaseModel):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Model:
    """The tokenizer and the template."""

    def __init__(self, directory: Path, name: str) -> None:
        config = json.loads((directory / "tokenizer_config.json").read_text())
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        self.name = name
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._template = environment.from_string(config["chat_template"])

    def token_ids(self, chat: ChatRequest) -> list[int]:
        """Return the tokens of the rendered conversation."""
        text = self._template.render(
            messages=[message.model_dump() for message in chat.messages], add_generation_prompt=True
        )
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


async def chunks(client: Client, model: Model, chat: ChatRequest) -> AsyncIterator[str]:
    """Yield the events of an answer."""
    token_ids = model.token_ids(chat)
    request = {
        "model": model.name,
        "token_ids": token_ids,
        "stop_conditions": {
            "max_tokens": chat.max_tokens,
            "min_tokens": chat.min_tokens,
            "ignore_eos": chat.ignore_eos,
        },
        "sampling_options": {},
        "eos_token_ids": [151645, 151643],
    }
    head: Mapping[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name,
    }  # fmt: skip
    stream = DecodeStream(skip_special_tokens=True)
    count = 0
    yield event(Chunk(**head, choices=[Choice(delta=Delta(role="assistant", content=""))]))
    async for item in await client.round_robin(request, annotated=False):
        pieces = [stream.step(model.tokenizer, token_id) for token_id in item["token_ids"]]
        count += len(pieces)
        text = "".join(piece for piece in pieces if piece)
        reason = item.get("finish_reason")
        if text or reason:
            choice = Choice(delta=Delta(content=text), finish_reason=reason)
            yield event(Chunk(**head, choices=[choice]))
    if chat.stream_options is not None and chat.stream_options.include_usage:
        usage = Usage(
            prompt_tokens=len(token_ids), completion_tokens=count, total_tokens=len(token_ids) + count
        )
        yield event(Chunk(**head, choices=[], usage=usage))
    yield "data: [DONE]\n\n"


def event(chunk: Chunk) -> str:
    """Return a chunk as a Server-Sent Event."""
    return f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"


def make_app(directory: Path, name: str) -> FastAPI:
    """Return the app. Its runtime starts with it."""
    model = Model(directory, name)
    clients: list[Client] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with DistributedRuntime() as runtime:
            client = await runtime.endpoint(ENDPOINT).client()
            await client.wait_for_instances(60)
            clients.append(client)
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/v1/models")  # type: ignore[untyped-decorator, unused-ignore]
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"}]}

    @app.post("/v1/chat/completions")  # type: ignore[untyped-decorator, unused-ignore]
    async def chat(body: ChatRequest) -> StreamingResponse:
        return StreamingResponse(chunks(clients[0], model, body), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    uvicorn.run(
        make_app(Path(sys.argv[2]), sys.argv[3]),
        host="127.0.0.1", port=int(sys.argv[1]), loop="uvloop", http="httptools", log_level="error",
    )  # fmt: skip
