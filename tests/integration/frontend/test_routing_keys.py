"""Parameters that concern routers and schedulers reach the worker, or are refused."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.integration.frontend.conftest import Frontend, OpenFrontend

MESSAGES: Any = [{"role": "user", "content": "Hi!"}]


async def test_worker_gets_routing_keys(open_frontend: OpenFrontend) -> None:
    frontend = await open_frontend(router_mode="kv")
    override = {"overlap_score_weight": 0.5, "router_temperature": 0.0}
    body = {
        "cache_salt": "tenant",
        "priority": -3,
        "nvext": {"backend_instance_id": 1, "router_config_override": override},
    }
    await frontend.client.chat.completions.create(model="demo", messages=MESSAGES, extra_body=body)
    [request] = frontend.worker.requests
    assert request["cache_salt"] == "tenant"
    assert request["priority"] == -3
    assert request["router_config_override"] == override
    [among] = frontend.worker.among
    assert list(among or ()) == [1]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"priority": 1.5}, "priority"),
        ({"nvext": {"backend_instance_id": 99}}, "99 serves no model 'demo'"),
        ({"nvext": {"router_config_override": {"temperature": 1}}}, "router_config_override.temperature"),
        ({"nvext": {"router_config_override": {"router_temperature": -1}}}, "router_temperature"),
        ({"nvext": {"router_config_override": {"router_temperature": 1}}}, "does not route by KV caches"),
    ],
)
async def test_wrong_routing_keys_are_refused(frontend: Frontend, body: Any, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        await frontend.client.chat.completions.create(model="demo", messages=MESSAGES, extra_body=body)
    assert not frontend.worker.requests
