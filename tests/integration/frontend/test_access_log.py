"""The access log: a line for each HTTP request, when it is asked for, that no client can forge."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from dynamo_redis.frontend.observation import access_log
from dynamo_redis.runtime.logging import JsonFormatter, TextFormatter
from tests.frontend_deployment import Deployment, until_healthy
from tests.kserve_client import infer_request, kserve_client

WITHIN_S = 60.0
PROMPT = {"model": "demo", "prompt": "A secret prompt.", "max_tokens": 6, "ignore_eos": True}


class Lines(logging.Handler):
    """Keeps the lines of the access log, as text and as JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.objects: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(TextFormatter("").format(record))
        self.objects.append(json.loads(JsonFormatter("").format(record)))

    async def last(self, count: int) -> dict[str, Any]:
        """Return the last line once there are `count`."""
        async with asyncio.timeout(WITHIN_S):
            while len(self.objects) < count:
                await asyncio.sleep(0.01)
        assert len(self.objects) == count
        return self.objects[-1]


@pytest.fixture
def lines() -> Iterator[Lines]:
    level, handler = access_log.level, Lines()
    access_log.addHandler(handler)
    yield handler
    access_log.removeHandler(handler)
    access_log.setLevel(level)


async def wait_until_healthy(url: str, lines: Lines) -> None:
    await until_healthy(url)
    lines.texts.clear()
    lines.objects.clear()


async def test_completion_line_has_counts_and_times(deployment: Deployment, lines: Lines) -> None:
    await deployment.worker()
    url = await deployment.frontend(access_log=True)
    await wait_until_healthy(url, lines)
    async with httpx.AsyncClient(base_url=url, timeout=WITHIN_S) as http:
        for count, stream in enumerate((False, True), 1):
            headers = {"X-Request-Id": f"mine-{count}", "Authorization": "Bearer sk-secret"}
            answer = await http.post(
                "/v1/completions?key=sk-secret", json={**PROMPT, "stream": stream}, headers=headers
            )
            assert answer.status_code == 200
            line = await lines.last(count)
            assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
            assert (line["model"], line["completion_tokens"]) == ("demo", 6)
            assert line["prompt_tokens"] > 1
            assert 0 < line["time_to_first_token_s"] <= line["duration_s"]
            assert (line["request_id"], line["target"]) == (f"mine-{count}", "dynamo_redis.access")
            assert "error" not in line
            text = lines.texts[-1]
            assert "dynamo_redis.access: POST /v1/completions 200 model=demo prompt_tokens=" in text
            assert text.endswith(f"[request mine-{count}]")
    shown = "\n".join(lines.texts) + json.dumps(lines.objects)
    assert "secret" not in shown


async def test_refusals_and_other_paths_have_lines(deployment: Deployment, lines: Lines) -> None:
    await deployment.worker()
    url = await deployment.frontend(access_log=True)
    await wait_until_healthy(url, lines)
    async with httpx.AsyncClient(base_url=url, timeout=WITHIN_S) as http:
        await http.post("/v1/completions", json={**PROMPT, "model": "x\nfake"})
        assert (await lines.last(1))["error"] == "not_found"
        assert lines.objects[0]["status"] == 404
        assert "model" not in lines.objects[0]
        await http.get("/v1/models")
        assert (await lines.last(2))["path"] == "/v1/models"
        await http.get("/no%0Asuch%20path")
        assert (await lines.last(3))["path"] == "/no%0Asuch%20path"
        assert "GET /no%0Asuch%20path 404 " in lines.texts[-1]


async def test_pipelined_request_has_its_own_line(deployment: Deployment, lines: Lines) -> None:
    """It begins in the task of the request before, and has neither its id nor its trace."""
    await deployment.worker()
    url = await deployment.frontend(access_log=True)
    await wait_until_healthy(url, lines)
    address, content = httpx.URL(url), json.dumps(PROMPT).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\nContent-Length: {len(content)}"
    _, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(head.encode() + b"\r\n\r\n" + content + b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
    line = await lines.last(2)
    assert lines.objects[0]["request_id"] == "mine"
    assert line["path"] == "/live"
    assert "request_id" not in line
    writer.close()


async def test_client_that_leaves_has_a_line(deployment: Deployment, lines: Lines) -> None:
    await deployment.worker(speedup_ratio=0.05)
    url = await deployment.frontend(access_log=True)
    await wait_until_healthy(url, lines)
    body = {**PROMPT, "max_tokens": 2000, "stream": True}
    async with httpx.AsyncClient(base_url=url, timeout=WITHIN_S) as http:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            await anext(answer.aiter_lines())
        line = await lines.last(1)
    assert (line["status"], line["error"], line["model"]) == (200, "cancelled", "demo")
    assert line["completion_tokens"] < 2000


async def test_client_that_leaves_early_has_a_line(deployment: Deployment, lines: Lines) -> None:
    url = await deployment.frontend(access_log=True)
    address = httpx.URL(url)
    _, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    await writer.drain()
    writer.close()
    line = await lines.last(1)
    assert (line["status"], line["error"]) == (499, "cancelled")


async def test_requests_have_no_line_by_default(
    deployment: Deployment, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    await deployment.worker()
    url = await deployment.frontend()
    await until_healthy(url)
    with caplog.at_level(logging.INFO, logger="dynamo_redis"):
        caplog.clear()
        async with httpx.AsyncClient(base_url=url, timeout=WITHIN_S) as http:
            for stream in (False, True):
                answer = await http.post("/v1/completions", json={**PROMPT, "stream": stream})
                assert answer.status_code == 200
    assert not lines.texts
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("dynamo_redis")]


async def test_call_over_grpc_has_a_line(deployment: Deployment, lines: Lines) -> None:
    ports: list[int] = []
    await deployment.worker()
    url = await deployment.frontend(ports.append, access_log=True, kserve_grpc_server=True, grpc_port=0)
    await wait_until_healthy(url, lines)
    async with kserve_client(ports[0]) as client:
        request = infer_request(parameters={"max_tokens": 6, "ignore_eos": True})
        await client.answer(request, metadata=(("x-request-id", "mine"),))
        line = await lines.last(1)
        assert (line["path"], line["status"]) == ("/inference.GRPCInferenceService/ModelInfer", 200)
        assert (line["model"], line["completion_tokens"], line["request_id"]) == ("demo", 6, "mine")
        with pytest.raises(grpc.aio.AioRpcError):
            await client.infer(infer_request(model_name="unknown"))
        assert ((await lines.last(2))["status"], lines.objects[1]["error"]) == (404, "not_found")
