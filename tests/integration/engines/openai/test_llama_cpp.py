"""llama.cpp's own server with a tiny model of random weights, on the CPU.

python -m venv .bench/llama
.bench/llama/bin/pip install xllamacpp gguf
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from tokenizers import Tokenizer

from dynamo_redis.config import OpenAIEngineSettings
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.openai.engine import OpenAIEngine
from dynamo_redis.errors import InvalidRequest
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context

PYTHON = Path(__file__).parents[4] / ".bench" / "llama" / "bin" / "python"
PROGRAM = Path(__file__).with_name("llama_server.py")

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no llama.cpp server: see the top of test_llama_cpp.py for how to install it"
)


@asynccontextmanager
async def llama_server(directory: Path) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(DEMO_MODEL_PATH), str(directory / "tiny.gguf"), str(port)]
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            str(PYTHON), str(PROGRAM), *arguments, stdout=log, stderr=log
        )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@asynccontextmanager
async def engine_at(url: str) -> AsyncIterator[OpenAIEngine]:
    settings = OpenAIEngineSettings(
        engine_url=url, engine_poll_interval_s=0.05, engine_start_timeout_s=60, engine_total_kv_blocks=128
    )
    engine = OpenAIEngine(settings, read_model_directory(DEMO_MODEL_PATH))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.aclose()


def request(prompt: list[int], **stop: Any) -> GenerateRequest:
    body = {
        "model": "demo",
        "token_ids": prompt,
        "stop_conditions": {"max_tokens": 40, "ignore_eos": True, **stop},
        "sampling_options": {"temperature": 0.0, "seed": 1},
        "eos_token_ids": [2],
    }
    return cast("GenerateRequest", body)


async def answer(
    engine: OpenAIEngine, wanted: GenerateRequest, context: Context | None = None
) -> list[GenerateItem]:
    async with aclosing(engine.generate(wanted, context or Context())) as items:
        return [item async for item in items]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def test_llama_cpp_serves_behind_a_worker(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_buffer((DEMO_MODEL_PATH / "tokenizer.json").read_bytes())
    prompt: list[int] = tokenizer.encode("The river finds its way without a plan. " * 5).ids
    async with llama_server(tmp_path) as (url, process), engine_at(url) as engine:
        assert "llamacpp" in repr(engine)

        items = await answer(engine, request(prompt))
        text = tokenizer.decode([token for item in items for token in item["token_ids"]])
        assert text == await own_answer(url, prompt)
        assert items[-1]["finish_reason"] == "length"
        assert len(items) > 10
        again = await answer(engine, request(prompt))
        assert again[-1]["cached_tokens"] > len(prompt) // 2

        with pytest.raises(InvalidRequest):
            await answer(engine, request(prompt * 100))

        context = Context()
        endless = asyncio.create_task(answer(engine, request(prompt, max_tokens=1900), context))
        await until(lambda: engine.loads()[0].running_count == 1)
        context.stop_generating()
        assert (await endless)[-1]["finish_reason"] == "cancelled"
        await until(lambda: engine.loads()[0].running_count == 0)

        process.kill()
        await asyncio.wait_for(engine.wait_health(False), 30)


async def own_answer(url: str, prompt: list[int]) -> str:
    """Return the server's answer to a direct request without streaming."""
    body = {"prompt": prompt, "max_tokens": 40, "ignore_eos": True, "temperature": 0.0, "seed": 1}
    async with httpx.AsyncClient() as client:
        response = await client.post(f"{url}/v1/completions", content=json.dumps(body))
    text: str = response.json()["choices"][0]["text"]
    return text
