"""The settings by which requests reach workers."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_redis.config import FrontendSettings, RouterSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.routing import client_opener


def opener(**settings: Any) -> Any:
    runtime: Any = None
    return client_opener(runtime, FrontendSettings.load(**settings), RouterSettings.load())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "by_policy"),
        ({"router_mode": "p2c"}, "by_policy"),
        ({"router_mode": "kv"}, "by_own_router"),
        ({"router_mode": "kv", "router_endpoint": "dynamo.router.generate"}, "by_router_service"),
    ],
)
def test_each_mode_opens_its_client(settings: dict[str, Any], name: str) -> None:
    assert opener(**settings).__name__ == name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"router_endpoint": "dynamo.router.generate"}, "add --router-mode kv"),
        ({"router_mode": "kv", "router_endpoint": "router"}, "write namespace.component.endpoint"),
    ],
)
def test_conflicting_settings_are_an_error(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        opener(**settings)
