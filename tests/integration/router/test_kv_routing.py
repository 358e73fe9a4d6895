"""Requests go where their prefix is: workers with the mock engine, frontends with the router inside."""

from __future__ import annotations

from typing import Any

import httpx

from tests.routed_deployment import Deployment, until, until_served

STORY = "Once upon a time there was a router that knew what every worker had read before. " * 8


async def complete(frontend: httpx.AsyncClient, prompt: str, **fields: Any) -> dict[str, Any]:
    response = await frontend.post(
        "/v1/completions", json={"model": "demo", "prompt": prompt, "max_tokens": 4, **fields}
    )
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def cached_tokens(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


async def test_a_prefix_that_was_read_once_is_read_by_nobody_again(deployment: Deployment) -> None:
    workers = [await deployment.worker() for _ in range(2)]
    frontend = await deployment.frontend()
    await until_served(frontend, instances=2)
    first = await complete(frontend, STORY)
    assert cached_tokens(first) == 0
    await until(lambda: any(worker.engine.cache.stored() for worker in workers))
    holder = next(worker for worker in workers if worker.engine.request_count)
    import asyncio
    await asyncio.sleep(0.5)
    second = await complete(frontend, STORY + "And then?")
    assert cached_tokens(second) > 0.7 * first["usage"]["prompt_tokens"]
    assert holder.engine.request_count == 2
