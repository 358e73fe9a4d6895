"""compose/vllm.yml: valid over single.yml, with vLLM's own flags, and a worker that follows its KV events.

No vLLM is here: an engine of the tests takes its place behind the worker's own command line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from tests.compose_files import check, health_check, merged, read
from tests.integration.compose.conftest import Deploy, chat
from tests.vllm_arguments import OPTIONS, SWITCHES, check_kv_events

START_S = 90.0


@pytest.fixture
def vllm(directory: Path) -> dict[str, Any]:
    return read(directory / "vllm.yml")


@pytest.fixture
def compose(directory: Path, vllm: dict[str, Any]) -> dict[str, Any]:
    return merged(read(directory / "single.yml"), vllm)


def test_vllm_file_is_valid_alone_and_merged(compose: dict[str, Any], vllm: dict[str, Any]) -> None:
    check(vllm)
    check(compose)


def test_engine_has_a_gpu_and_an_exact_version(compose: dict[str, Any]) -> None:
    engine = compose["services"]["engine"]
    [device] = engine["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert engine["image"].startswith("vllm/vllm-openai:v")
    assert "ports" not in engine, "only the worker calls the engine, which asks for no key"


def test_engine_takes_flags_that_vllm_documents(compose: dict[str, Any]) -> None:
    engine, worker = compose["services"]["engine"], compose["services"]["worker"]
    assert engine["entrypoint"] == ["vllm", "serve"]
    found = arguments_of(engine["command"])
    assert found["--served-model-name"].startswith("${MODEL_NAME:?")
    environment = worker["environment"]
    assert environment["DYN_ENGINE_URL"] == f"http://engine:{found['--port']}"
    assert f":{found['--port']}/health" in engine["healthcheck"]["test"][-1]
    check_kv_events(
        json.loads(found["--kv-events-config"]),
        host="engine",
        events=environment["DYN_KV_EVENTS_ENDPOINT"],
        replay=environment["DYN_KV_REPLAY_ENDPOINT"],
    )


def arguments_of(command: list[str]) -> dict[str, str]:
    """Return vLLM's options with their values. Fails at one that vLLM does not document."""
    model, *words = command
    assert model == "/model"
    found = {}
    rest = iter(words)
    for word in rest:
        name, given, value = word.partition("=")
        assert name in OPTIONS | SWITCHES, name
        found[name] = value if given or name in SWITCHES else next(rest)
    return found


async def test_worker_serves_an_engine_natively(compose: dict[str, Any], deploy: Deploy) -> None:
    pytest.importorskip("aiohttp", reason="the extra engines is not installed")
    from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
    from tests.integration.engines.openai_engine import TestEngine

    deployment = deploy(
        compose,
        ["redis", "frontend", "worker", "engine"],
        ports={"engine": [8001, 5557, 5657]},
        variables={"MODEL_NAME": "demo", "MODEL_DIRECTORY": str(DEMO_MODEL_PATH)},
    )
    engine = TestEngine(owner="vllm", name="demo")
    await engine.start(
        http_port=deployment.port("engine", 8001),
        event_port=deployment.port("engine", 5557),
        replay_port=deployment.port("engine", 5657),
    )
    try:
        for host in ("redis", "worker", "frontend"):
            deployment.start(host)
        for host in ("worker", "frontend"):
            await deployment.until_it_succeeds(host, health_check(compose, host))
        url = f"http://127.0.0.1:{deployment.port('frontend', 8000)}"
        async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:
            await chat(http, instances=1, within_s=START_S)
        assert engine.requests
        follows = f"receives the engine's KV events at tcp://127.0.0.1:{deployment.port('engine', 5557)}"
        with anyio.fail_after(START_S):
            while follows not in deployment.log("worker").read_text():
                await anyio.sleep(0.02)
    finally:
        await engine.stop()
