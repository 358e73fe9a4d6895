"""`/dashboard`: its files, and the stream of the state of real deployments."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_redis.frontend.dashboard import dashboard as module
from dynamo_redis.runtime import DistributedRuntime, Settings
from dynamo_redis.store.server import EmbeddedServer
from tests.dashboard_stream import dashboard
from tests.frontend_deployment import Deployment, until_healthy
from tests.frontend_programs import Programs, until_served_everywhere

ENDPOINT = "dynamo.backend.generate"
PROMPT = {"model": "demo", "prompt": "Tell me a long story.", "max_tokens": 30, "ignore_eos": True}


async def complete(url: str, **changes: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=60) as http:
        return await http.post(f"{url}/v1/completions", json={**PROMPT, **changes})


async def test_page_loads_nothing_from_elsewhere(deployment: Deployment) -> None:
    url = await deployment.frontend()
    async with httpx.AsyncClient(base_url=url) as http:
        answers = [
            await http.get(path) for path in ("/dashboard", "/dashboard/page.css", "/dashboard/page.js")
        ]
    kinds = [answer.headers["content-type"].partition(";")[0] for answer in answers]
    assert kinds == ["text/html", "text/css", "text/javascript"]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith(
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"
        )
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert set(re.findall(r"https?://[\w.]+", answer.text)) <= {"http://www.w3.org"}  # SVG's namespace
    html = answers[0].text
    assert re.findall(r"<script(?! src=)|<style| style=| on\w+=", html) == []


async def test_stream_follows_a_deployment(deployment: Deployment) -> None:
    url = await deployment.frontend()
    async with dashboard(url) as page:
        assert (await page.next())["verdict"][:2] == ["bad", "Not serving"]
        assert page.state["problems"][0][1] == "No model is registered"
        await deployment.worker()
        await page.until(lambda state: state["verdict"][:2] == ["ok", "Serving"] and state["loads"])
        [(name, who)] = page.state["who"].items()
        assert who[:3] == [ENDPOINT, name.rpartition("/")[2], "demo"]
        assert page.state["loads"][name][:2] == ["serving", 0]
        assert page.events("joined") == [(ENDPOINT, 1, who[1])]
        assert page.events("model_served") == [("demo", 1, "")] or not page.events("model_served")
        assert (await complete(url)).status_code == 200
        await page.until(lambda state: state["figures"]["ended"] == 1)
        assert page.state["figures"]["failed"] == 0
        assert None not in page.state["figures"]["times"]["first"]
        await page.until(lambda state: sum(point[1] for point in state["points"].values()) >= 20)
        await deployment.processes[-1].end()
        deployment.processes.pop()
        await page.until(lambda state: not state["who"] and not state["models"])
        await page.until(lambda _: page.events("left") and page.events("model_ended"))
        assert page.events("left") == [(ENDPOINT, 1, who[1])]
        assert (await complete(url)).status_code == 503
        await page.until(lambda state: state["figures"]["failed"] == 1)
        assert "change" in page.kinds


async def test_draining_worker_is_shown_with_its_requests(deployment: Deployment) -> None:
    await deployment.worker(speedup_ratio=1)
    url = await deployment.frontend()
    await until_healthy(url)
    async with dashboard(url) as page, httpx.AsyncClient(timeout=60) as http:
        body = {**PROMPT, "max_tokens": 20_000, "stream": True}
        async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            await page.until(lambda state: [load[:2] for load in state["loads"].values()] == [["serving", 1]])
            deployment.processes[0].runtime.shutdown()
            await page.until(
                lambda state: [load[:2] for load in state["loads"].values()] == [["draining", 1]]
            )
        await page.until(lambda state: not state["loads"])


async def test_failed_requests_are_counted(deployment: Deployment) -> None:
    await deployment.worker(speedup_ratio=1, max_num_seqs=1, max_num_waiting=1)
    url = await deployment.frontend(http_queue_wait_s=0, max_http_in_flight_count=1)
    await until_healthy(url)
    async with dashboard(url) as page, httpx.AsyncClient(timeout=60) as http:
        body = {**PROMPT, "max_tokens": 20_000, "stream": True}
        async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            assert (await complete(url)).status_code == 503
            await page.until(lambda state: state["figures"]["failed"] == 1)
        assert "1 of 1 requests failed" in page.state["problems"][0][1]


async def test_router_is_shown_with_lag_and_hit_rate(deployment: Deployment) -> None:
    await deployment.worker()
    url = await deployment.frontend(router_mode="kv")
    await until_healthy(url)
    async with dashboard(url) as page:
        prompt = "The same words at the beginning of each prompt. " * 20
        for _ in range(3):
            assert (await complete(url, prompt=prompt)).status_code == 200
        await page.until(lambda state: state["figures"]["hit_rate"])
        [router] = page.state["routers"]
        assert (router["endpoint"], router["mode"], router["connected"]) == (ENDPOINT, "events", True)
        await page.until(lambda state: state["routers"][0]["lag_entries"] == 0)
        [load] = page.state["loads"].values()
        assert load[2] is not None
        assert load[3] > 0


async def test_dashboard_can_be_switched_off(deployment: Deployment) -> None:
    url = await deployment.frontend(dashboard=False)
    async with httpx.AsyncClient(base_url=url) as http:
        for path in ("/dashboard", "/dashboard/events", "/dashboard/reading"):
            answer = await http.get(path)
            assert answer.status_code == 404
            assert "/dashboard" not in answer.text.partition("There are:")[2]


async def test_browsers_are_bounded(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_VIEWERS", 1)
    url = await deployment.frontend()
    async with httpx.AsyncClient(timeout=60) as http:
        async with dashboard(url) as page:
            await page.next()
            assert (await http.get(f"{url}/dashboard/events")).status_code == 503
        async with asyncio.timeout(30):
            while True:
                async with http.stream("GET", f"{url}/dashboard/events") as again:
                    if again.status_code == 200:
                        break


async def test_shutdown_ends_the_stream(deployment: Deployment) -> None:
    url = await deployment.frontend()
    async with dashboard(url) as page:
        await page.next()
        deployment.processes[-1].runtime.shutdown()
        await page.until_end()


async def test_numbers_are_those_of_all_processes(
    deployment: Deployment, tmp_path: Path, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    await deployment.worker()
    programs = Programs(tmp_path, dynamo_redis_url, dynamo_redis_prefix)
    try:
        frontend = programs.frontend("--frontend-processes", "2")
        url = await frontend.url()
        pids = set(frontend.children())
        await until_served_everywhere(url)
        async with dashboard(url) as page:
            for _ in range(20):  # each on a connection of its own: both processes get some of them
                assert (await complete(url, max_tokens=2)).status_code == 200
            await page.until(lambda state: state["figures"]["ended"] == 20)
            assert set(page.state["processes"]) == pids
            assert page.state["verdict"][0] == "ok"
            assert len(page.state["who"]) == 1
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{url}/dashboard/reading")).status_code == 404
    finally:
        programs.kill()


@pytest.fixture
async def own_deployment(own_redis_server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[Deployment]:
    """A deployment on a Redis that the test may stop."""
    async with AsyncExitStack() as ending:

        async def open_runtime() -> DistributedRuntime:
            settings = Settings.load(redis_url=own_redis_server.url, drain_s=2)
            return await ending.enter_async_context(DistributedRuntime(settings=settings))

        deployment = Deployment(open_runtime, tmp_path / "cache", [])
        yield deployment
        for process in reversed(deployment.processes):
            await process.end()


async def test_lost_redis_is_shown(own_deployment: Deployment, own_redis_server: EmbeddedServer) -> None:
    await own_deployment.worker()
    url = await own_deployment.frontend()
    await until_healthy(url)
    async with dashboard(url) as page:
        await page.until(lambda state: state["verdict"][0] == "ok")
        await own_redis_server.kill()
        await page.until(lambda state: state["verdict"][0] == "warn")
        assert page.state["problems"][0][1] == "Redis does not answer"
        assert [load[0] for load in page.state["loads"].values()] == ["serving"]
        await own_redis_server.restart()
        await page.until(lambda state: state["verdict"][0] == "ok")
        await page.until(lambda _: page.events("redis_lost") and page.events("redis_back"))
