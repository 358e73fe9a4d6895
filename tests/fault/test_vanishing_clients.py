"""Clients that vanish at every stage of a request, while workers fail, refuse and are killed: at rest nothing
is left over, in the frontend, its router and the workers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_redis.errors import ConnectionLost, EngineFailed, HandlerFailed, Overloaded
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context
from dynamo_redis.router.asking import ask_states
from tests.routed_deployment import Deployment, NotingEngine, deployment, until_served

__all__ = ["deployment"]

STAGES = ["connect", "head", "body", "sent", "first", "between", "end", "never"]
CLIENT_COUNT = 144
AT_A_TIME = 24
PLACE_COUNT = 16
WITHIN_S = 60.0

GAUGES = [
    "dynamo_frontend_inflight_requests",
    "dynamo_frontend_queued_requests",
    "dynamo_frontend_admission_queued_requests",
    "dynamo_frontend_worker_active_decode_blocks",
    "dynamo_frontend_worker_active_prefill_tokens",
    "dynamo_redis_router_active_requests",
    "dynamo_redis_router_waiting_requests",
    "dynamo_redis_router_worker_active_requests",
]


class FlakyEngine(NotingEngine):
    """A mock engine that fails, refuses, or is lost, at random."""

    failures = 0.01
    rng = random.Random(7)

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateItem]:
        async for item in super().generate(request, context):
            if self.rng.random() < self.failures:
                kinds = [ConnectionLost, ConnectionLost, HandlerFailed, EngineFailed, Overloaded]
                raise self.rng.choice(kinds)("at random")
            yield item


class Client:
    """One request over a socket of its own, which vanishes at a stage."""

    def __init__(self, url: str, rng: random.Random) -> None:
        self._address = httpx.URL(url)
        self._stage = rng.choice(STAGES)
        self._resets = rng.random() < 0.5
        self._patience_s = rng.choice([0.0, 0.002, 0.02, 0.1])
        self._cut = rng.random()
        is_chat = rng.random() < 0.5
        words = " ".join(rng.choice(["one", "two", "three", "four"]) for _ in range(rng.choice([3, 60])))
        asks = {"messages": [{"role": "user", "content": words}]} if is_chat else {"prompt": words}
        self._path = "/v1/chat/completions" if is_chat else "/v1/completions"
        self._body = {
            "model": "demo",
            **asks,
            "max_tokens": rng.choice([1, 40, 200]),
            "ignore_eos": True,
            "stream": rng.random() < 0.7,
            "n": rng.choice([1, 1, 3]),
        }

    async def run(self) -> bool:
        """Send the request, and vanish. Return whether a whole answer came."""
        reader, writer = await asyncio.open_connection(self._address.host, self._address.port)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                return await self._ask(reader, writer)
            return False
        finally:
            if self._resets:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            else:
                writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        content = json.dumps(self._body).encode()
        head = f"POST {self._path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        if self._stage == "connect":
            return False
        if self._stage == "head":
            writer.write(head[: int(len(head) * self._cut)])
            return False
        if self._stage == "body":
            writer.write(head + content[: int(len(content) * self._cut)])
            await asyncio.sleep(self._patience_s)
            return False
        writer.write(head + content)
        if self._stage == "sent":
            await asyncio.sleep(self._patience_s)
            return False
        await reader.readuntil(b"\r\n\r\n")
        if self._stage == "first":
            return False
        if self._stage == "between":
            await reader.read(int(4000 * self._cut) + 1)
            await asyncio.sleep(self._patience_s)
            return False
        last = b"[DONE]" if self._body["stream"] else b'"usage"'
        with suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            async with asyncio.timeout(2.0 if self._stage == "end" else 5.0):
                await reader.readuntil(last)
                return True
        return False


async def gauges(frontend: httpx.AsyncClient) -> dict[str, float]:
    """Return the sum of each gauge."""
    found: dict[str, float] = dict.fromkeys(GAUGES, 0.0)
    for family in text_string_to_metric_families((await frontend.get("/metrics")).text):
        for sample in family.samples:
            if sample.name in found:
                found[sample.name] += sample.value
    return found


def start_worker(url: str, prefix: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "dynamo_redis", "worker", "mock"],
        env={
            **os.environ,
            "DYN_REDIS_URL": url,
            "DYN_REDIS_PREFIX": prefix,
            "DYN_MOCK_SPEEDUP_RATIO": "5",
            "DYN_LOG": "off",
        },
        stdout=subprocess.DEVNULL,
    )


@pytest.fixture
def killed_workers(
    dynamo_redis_url: str, dynamo_redis_prefix: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Yield processes that a test kills."""
    processes = [start_worker(dynamo_redis_url, dynamo_redis_prefix) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("mode", "seed"), [("kv", 1), ("round_robin", 2)])
async def test_nothing_is_left_of_vanished_clients(
    deployment: Deployment, killed_workers: list[subprocess.Popen[bytes]], mode: str, seed: int
) -> None:
    for _ in range(2):
        await deployment.worker(kind=FlakyEngine, speedup_ratio=20)
    frontend = await deployment.frontend(
        mode=mode,
        migration_limit=2,
        max_http_in_flight_count=PLACE_COUNT,
        http_queue_wait_s=0.2,
        router_queue_wait_s=0.2,
        active_prefill_tokens_threshold=2000,
    )
    await until_served(frontend, instances=4)
    rng = random.Random(seed)
    clients = [Client(str(frontend.base_url), rng) for _ in range(CLIENT_COUNT)]
    whole_count = 0
    for start in range(0, CLIENT_COUNT, AT_A_TIME):
        asking = asyncio.gather(*(client.run() for client in clients[start : start + AT_A_TIME]))
        if start and start % (CLIENT_COUNT // 3) == 0:
            killed_workers[start // (CLIENT_COUNT // 3) - 1].kill()
        whole_count += sum(await asking)
    assert whole_count

    async with asyncio.timeout(WITHIN_S):
        while any((left := await gauges(frontend)).values()):
            await asyncio.sleep(0.05)
    assert not any(left.values())
    looking = await deployment.open_runtime()
    for answer in await ask_states(looking):
        assert answer.state is not None
        assert (answer.state["active_count"], answer.state["waiting_count"]) == (0, 0)
    async with await looking.endpoint("dynamo.backend.generate").client() as workers:
        await workers.wait_for_instances(WITHIN_S)
        async with asyncio.timeout(WITHIN_S):
            while any(stats["endpoints"][0]["in_flight"] for stats in await stats_of(workers)):
                await asyncio.sleep(0.05)

    FlakyEngine.failures = 0.0
    try:
        body = {"model": "demo", "prompt": "once more", "max_tokens": 100, "ignore_eos": True}
        asks = [frontend.post("/v1/completions", json=body) for _ in range(PLACE_COUNT)]
        assert {answer.status_code for answer in await asyncio.gather(*asks)} == {200}
    finally:
        FlakyEngine.failures = 0.01


async def stats_of(workers: Any) -> list[dict[str, Any]]:
    """Return the stats of the instances that answer."""
    return [stats for stats in await workers.scrape_stats() if "error" not in stats]
