"""Clients that do not read their streams: what is produced for them is bounded, and others are served."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.models.directory import ModelDirectory
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context
from tests.frontend_deployment import Deployment, NotingEngine, until_healthy

CLIENT_COUNT = 8
CHOICE_COUNT = 4
WITHIN_S = 30.0

EVENT_BYTES = 150
"""An event has more than that."""

MOST_OF_A_CLIENT = 8 << 20
"""Bytes of events: 64 KiB in the frontend, and the kernel's buffers."""

MOST_OF_A_STREAM = 2_000
"""Items of a choice that are on their way from the worker, by its credit."""


class EndlessEngine(NotingEngine):
    """Answers requests that ignore the end without one, as fast as it may."""

    def __init__(self, settings: MockEngineSettings, model: ModelDirectory) -> None:
        super().__init__(settings, model)
        self.item_count = 0

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateItem]:
        if not request["stop_conditions"].get("ignore_eos"):
            async for item in super().generate(request, context):
                yield item
            return
        self.requests.append(request)
        while True:
            self.item_count += 1
            yield {"token_ids": [40]}


async def ask_and_not_read(url: str) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    address = httpx.URL(url)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, (address.host, address.port))
    body = {"model": "demo", "prompt": "Hi", "stream": True, "n": CHOICE_COUNT, "ignore_eos": True}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    await loop.sock_sendall(client, head.encode() + content)
    return client


async def in_flight_count(http: httpx.AsyncClient) -> float:
    found = text_string_to_metric_families((await http.get("/metrics")).text)
    return sum(
        sample.value
        for family in found
        for sample in family.samples
        if sample.name == "dynamo_frontend_inflight_requests"
    )


async def test_slow_clients_cost_bounded_memory(deployment: Deployment) -> None:
    engine = await deployment.worker(kind=EndlessEngine)
    assert isinstance(engine, EndlessEngine)
    url = await deployment.frontend()
    await until_healthy(url, 1)
    async with httpx.AsyncClient(base_url=url, timeout=WITHIN_S) as http, AsyncExitStack() as closing:
        for _ in range(CLIENT_COUNT):
            closing.enter_context(await ask_and_not_read(url))
        counts: list[int] = []
        async with asyncio.timeout(WITHIN_S):
            while len(engine.requests) < CLIENT_COUNT * CHOICE_COUNT or len(set(counts[-5:])) > 1:
                await asyncio.sleep(0.1)
                counts.append(engine.item_count)
        most = CLIENT_COUNT * (MOST_OF_A_CLIENT // EVENT_BYTES + CHOICE_COUNT * MOST_OF_A_STREAM)
        assert engine.item_count < most
        answer: dict[str, Any] = {"model": "demo", "prompt": "Hi", "max_tokens": 4}
        assert (await http.post("/v1/completions", json=answer)).status_code == 200
        assert await in_flight_count(http) == CLIENT_COUNT
        await closing.aclose()
        async with asyncio.timeout(WITHIN_S):
            while await in_flight_count(http):
                await asyncio.sleep(0.05)
