"""`dynamo_redis.llm.register_model`: a custom worker behind the frontend."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.errors import ConfigError, ModelError
from dynamo_redis.llm import (
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    WorkerType,
    register_llm,
    register_model,
    unregister_model,
)
from dynamo_redis.models.card import ModelCard
from dynamo_redis.models.vectors import pack
from dynamo_redis.runtime import DistributedRuntime
from tests.routed_deployment import WORKERS, Deployment, deployment, until_served

__all__ = ["deployment"]

BOTH = ModelType.Chat | ModelType.Completions
WITHIN_S = 20.0


async def echo(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield {"token_ids": request["token_ids"], "finish_reason": "stop"}


async def card_of(runtime: DistributedRuntime) -> ModelCard | None:
    record = await runtime.registry.get(WORKERS.model_card_key(runtime.instance_id))
    return None if record is None else ModelCard.from_bytes(record.value)


async def chat(frontend: httpx.AsyncClient) -> httpx.Response:
    body = {"model": "own", "messages": [{"role": "user", "content": "Hello"}]}
    return await frontend.post("/v1/chat/completions", json=body)


async def test_card_has_the_registered_values(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = await deployment.open_runtime()
    config = ModelRuntimeConfig()
    config.context_length, config.total_kv_blocks, config.max_num_seqs = 77, 5, 3
    config.data_parallel_size = 2
    config.tool_call_parser = "hermes"
    config.set_engine_specific("role", "test")
    endpoint = runtime.endpoint(str(WORKERS))
    await register_llm(
        ModelInput.Tokens,
        BOTH,
        endpoint,
        str(DEMO_MODEL_PATH),
        "own",
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=8,
        runtime_config=config,
    )
    card = await card_of(runtime)
    assert card is not None
    assert (card.display_name, card.context_length, card.kv_cache_block_size) == ("own", 77, 8)
    assert card.runtime_config.model_dump(exclude_none=True) == {
        "data_parallel_size": 2,
        "total_kv_blocks": 5,
        "max_num_seqs": 3,
        "event_plane": "stream",
        "tool_call_parser": "hermes",
    }
    assert [m for m in caplog.messages if "ModelRuntimeConfig: runtime_data" in m]
    with pytest.raises(ConfigError, match="has a model already"):
        await register_model(ModelInput.Tokens, BOTH, endpoint, DEMO_MODEL_PATH)
    await unregister_model(endpoint)
    await unregister_model(endpoint)
    assert await card_of(runtime) is None
    await register_model(ModelInput.Tokens, BOTH, endpoint, DEMO_MODEL_PATH)
    runtime.shutdown()
    reader = await deployment.open_runtime()
    async with asyncio.timeout(WITHIN_S):
        while await reader.registry.get(WORKERS.model_card_key(runtime.instance_id)) is not None:
            await asyncio.sleep(0.02)


async def test_chat_model_takes_no_text(deployment: Deployment, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    runtime = await deployment.open_runtime()
    endpoint = runtime.endpoint(str(WORKERS))
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat,
        endpoint,
        DEMO_MODEL_PATH,
        "own",
        custom_template_path=template,
    )
    serving = endpoint.serve_endpoint(echo)
    frontend = await deployment.frontend(mode="round_robin")
    await until_served(frontend)
    answer = await chat(frontend)
    assert answer.json()["choices"][0]["message"]["content"] == "<user>Hello"
    refused = await frontend.post("/v1/completions", json={"model": "own", "prompt": "Hello"})
    assert refused.status_code == 400
    assert "takes conversations only" in refused.json()["error"]["message"]
    await unregister_model(endpoint)
    async with asyncio.timeout(WITHIN_S):
        while (await chat(frontend)).status_code == 200:
            await asyncio.sleep(0.02)
    assert (await frontend.get("/v1/models")).json()["data"] == []
    runtime.shutdown()
    await serving


@pytest.mark.parametrize("model_input", [ModelInput.Tokens, ModelInput.Text])
async def test_embedding_worker_is_served(deployment: Deployment, model_input: ModelInput) -> None:
    """The handler answers in the two forms that Dynamo's own workers have."""
    requests: list[dict[str, Any]] = []

    async def embed(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        requests.append(request)
        if model_input is ModelInput.Tokens:
            yield {"embeddings": [[1.0, 0.5]], "prompt_tokens": 3, "total_tokens": 3}
            return
        entry = {"object": "embedding", "embedding": pack([1.0, 0.5]), "index": 0}
        yield {"object": "list", "data": [entry], "usage": {"prompt_tokens": 3, "total_tokens": 3}}

    runtime = await deployment.open_runtime()
    endpoint = runtime.endpoint(str(WORKERS))
    await register_model(model_input, ModelType.Embedding, endpoint, DEMO_MODEL_PATH, "own")
    serving = endpoint.serve_endpoint(embed)
    frontend = await deployment.frontend(mode="round_robin")
    await until_served(frontend)
    answer = await frontend.post("/v1/embeddings", json={"model": "own", "input": "Hello"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == [{"object": "embedding", "index": 0, "embedding": [1.0, 0.5]}]
    assert answer.json()["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert requests[0].get("input") == (["Hello"] if model_input is ModelInput.Text else None)
    runtime.shutdown()
    await serving


async def test_completions_model_takes_no_chats(deployment: Deployment) -> None:
    runtime = await deployment.open_runtime()
    endpoint = runtime.endpoint(str(WORKERS))
    await register_model(ModelInput.Tokens, ModelType.Completions, endpoint, DEMO_MODEL_PATH, "own")
    card = await card_of(runtime)
    assert card is not None
    assert card.model_type == "completions"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_input": ModelInput.Text}, ConfigError, "frontends send tokens"),
        (
            {"model_input": ModelInput.Tensor, "model_type": ModelType.Embedding},
            ConfigError,
            "frontends send tokens",
        ),
        ({"model_type": ModelType.Embedding | ModelType.Chat}, ConfigError, "ModelType.Completions"),
        ({"model_type": ModelType.Empty}, ConfigError, "ModelType.Completions"),
        ({"worker_type": WorkerType.Prefill}, ConfigError, "worker_type=prefill"),
        ({"lora_name": "x"}, ConfigError, "lora_name is not supported"),
        ({"model_aliases": ["x"]}, ConfigError, "model_aliases is not supported"),
        ({"skip_model_assets": True}, ConfigError, "skip_model_assets is not supported"),
        ({"needs": [[WorkerType.Prefill]]}, ConfigError, "needs is not supported"),
        ({"runtime_config": ModelRuntimeConfig(data_parallel_start_rank=2)}, ConfigError, "begin at 0"),
        ({"runtime_config": ModelRuntimeConfig(data_parallel_size=0)}, ConfigError, "data_parallel_size"),
        (
            {"runtime_config": ModelRuntimeConfig(tool_call_parser="x")},
            ConfigError,
            "auto, none, deepseek_v3",
        ),
        ({"runtime_config": ModelRuntimeConfig(reasoning_parser="x")}, ConfigError, "auto, none, basic"),
        ({"kv_cache_block_size": -1}, ConfigError, "kv_cache_block_size"),
        ({"model_path": "Qwen/Qwen3-8B"}, ModelError, "nothing is downloaded"),
        ({"custom_template_path": "/nowhere.jinja"}, ModelError, "cannot read /nowhere.jinja"),
    ],
    ids=str,
)
async def test_unsupported_arguments_are_refused_by_name(
    deployment: Deployment, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    runtime = await deployment.open_runtime()
    given = {
        "model_input": ModelInput.Tokens,
        "model_type": BOTH,
        "endpoint": runtime.endpoint(str(WORKERS)),
        "model_path": DEMO_MODEL_PATH,
    } | changes
    register: Callable[..., Any] = register_model
    with pytest.raises(error, match=re.escape(message)):
        await register(**given)
    assert await card_of(runtime) is None


async def test_broken_template_is_not_registered(deployment: Deployment, tmp_path: Path) -> None:
    template = tmp_path / "broken.jinja"
    template.write_text("{% if %}")
    runtime = await deployment.open_runtime()
    with pytest.raises(ModelError, match="does not compile"):
        await register_model(
            ModelInput.Tokens,
            BOTH,
            runtime.endpoint(str(WORKERS)),
            DEMO_MODEL_PATH,
            custom_template_path=template,
        )
    assert await card_of(runtime) is None
