"""Notices on variables that look like settings and are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynamo_redis.config import unknown_settings


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.upper().startswith("DYN_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_settings_are_known_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DYN_REDIS_URL", "dyn_router_mode", "DYN_LOCK_TOKEN", "DYN_TEST_REDIS", "XDYN_LOG"):
        monkeypatch.setenv(name, "x")
    assert unknown_settings() == {}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("DYN_REDIS_PREFX", "DYN_REDIS_PREFIX"),
        ("DYN_ROUTERMODE", "DYN_ROUTER_MODE"),
        ("DYN_TCP_ADVERTISED_HOST", "DYN_TCP_ADVERTISE_HOST"),
        ("DYN_LEASE_TTL", "DYN_LEASE_TTL_S"),
    ],
)
def test_a_misspelt_name_is_told_the_right_one(
    wrong: str, right: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(wrong, "x")
    assert unknown_settings() == {wrong: f"{wrong} is not a setting and has no effect: is {right} meant?"}


def test_a_name_unlike_all_others_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_WHOLLY_OTHER_THING", "x")
    assert unknown_settings() == {
        "DYN_WHOLLY_OTHER_THING": "DYN_WHOLLY_OTHER_THING is not a setting and has no effect"
    }


def test_names_in_a_file_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DYN_REDIS_URLL=redis://x\nDYN_LOG=info\nOTHER=1\n")
    assert list(unknown_settings()) == ["DYN_REDIS_URLL"]
