"""The shutdown of a frontend whose requests do not end in time, or whose clients do not read."""

from __future__ import annotations

import asyncio
import json
import logging
import socket

import pytest

from dynamo_redis.frontend.http import protocol
from tests.routed_deployment import Deployment, until, until_served
from tests.routed_deployment import deployment as deployment

WITHIN_S = 60.0
LONG = {"model": "demo", "prompt": "Hi", "max_tokens": 3000, "ignore_eos": True}


async def test_requests_over_the_time_end_with_errors(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    """One in the middle of its stream, one without a response yet, one that waits for its place."""
    worker = await deployment.worker(speedup_ratio=0.05)
    frontend = await deployment.frontend(
        {"drain_s": 0.5}, mode="round_robin", max_http_in_flight_count=2, http_queue_wait_s=WITHIN_S
    )
    await until_served(frontend)
    process = deployment.processes[-1]

    async def read_stream() -> list[str]:
        async with frontend.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            return [line async for line in answer.aiter_lines() if line]

    streamed = asyncio.create_task(read_stream())
    whole = asyncio.create_task(frontend.post("/v1/completions", json=LONG))
    await until(lambda: worker.engine.request_count == 2)
    waiting = asyncio.create_task(frontend.post("/v1/completions", json=LONG))
    async with asyncio.timeout(WITHIN_S):
        while "admission_queued_requests 1.0" not in (await frontend.get("/metrics")).text:
            await asyncio.sleep(0.01)

    with caplog.at_level(logging.INFO):
        process.runtime.shutdown()
        async with asyncio.timeout(WITHIN_S):
            await process.serving
        *_, last = await streamed
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        for answer in (await whole, await waiting):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
            assert answer.headers["retry-after"] == "1"
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert "3 that have not ended are cut off (DYN_GRACEFUL_SHUTDOWN_S)" in lines[0]


async def end_before_a_client_that_does_not_read(deployment: Deployment, drain_s: float) -> None:
    """Fill a client's connection, shut the frontend down, and wait for its end."""
    worker = await deployment.worker()
    frontend = await deployment.frontend({"drain_s": drain_s}, mode="round_robin")
    await until_served(frontend)
    process = deployment.processes[-1]
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((frontend.base_url.host, frontend.base_url.port))
        content = json.dumps({**LONG, "n": 64, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        client.sendall(head.encode() + content)
        await until(lambda: worker.engine.request_count == 64)
        process.runtime.shutdown()
        async with asyncio.timeout(WITHIN_S):
            await process.serving


async def test_client_that_does_not_read_delays_no_shutdown(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "DRAIN_SEND_S", 0.2)
    await end_before_a_client_that_does_not_read(deployment, drain_s=3600)


async def test_full_connection_delays_the_end_briefly(deployment: Deployment) -> None:
    """The error of its request cannot be written, so it is dropped."""
    await end_before_a_client_that_does_not_read(deployment, drain_s=0.5)
