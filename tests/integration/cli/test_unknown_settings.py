"""Commands and services name variables that look like settings and are not."""

from __future__ import annotations

import pytest

from tests.integration.conftest import Cli


def test_commands_name_misspelt_settings(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_REDIS_PREFX", "x")
    for command in (("instances", "--json"), ("put", "a", "b")):
        done = cli(*command)
        assert done.code == 0
        assert "DYN_REDIS_PREFX is not a setting and has no effect: is DYN_REDIS_PREFIX meant?" in done.err


def test_services_name_misspelt_settings(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_ROUTERMODE", "kv")
    monkeypatch.setenv("DYN_REDIS_URL", "redis://127.0.0.1:1")
    done = cli("worker", "mock")
    assert done.code == 1
    assert "DYN_ROUTERMODE is not a setting and has no effect: is DYN_ROUTER_MODE meant?" in done.err
