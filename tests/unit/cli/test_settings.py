from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamo_redis.cli.app import run
from dynamo_redis.cli.settings_page import render
from dynamo_redis.config import GROUPS, write_runtime_file


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for group in GROUPS:
        for field in group.model_fields.values():
            monkeypatch.delenv(str(field.validation_alias), raising=False)


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, object]]:
    assert run(["settings", "--json", *arguments]) == 0
    return {row["env"]: row for row in json.loads(capsys.readouterr().out)}


def test_settings_tell_value_unit_and_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".env").write_text("DYN_HTTP_PORT=8123\n")
    monkeypatch.setenv("DYN_LEASE_TTL_S", "30s")
    found = rows(capsys, "--max-message", "1MiB")
    assert len(found) == sum(len(group.model_fields) for group in GROUPS)

    def shown(env: str) -> tuple[object, object, object]:
        return found[env]["value"], found[env]["unit"], found[env]["source"]

    assert shown("DYN_LEASE_TTL_S") == (30, "s", "environment")
    assert shown("DYN_HTTP_PORT") == (8123, "", ".env")
    assert shown("DYN_TCP_MAX_MESSAGE_SIZE") == (1 << 20, "bytes", "command line")
    assert shown("DYN_REDIS_PREFIX") == ("dynamo", "", "default")
    assert shown("DYN_REDIS_URL") == (None, "", "default")


def test_a_running_up_is_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    write_runtime_file(redis_url="unix:///run/redis.sock", prefix="mine")
    found = rows(capsys)
    assert (found["DYN_REDIS_URL"]["value"], found["DYN_REDIS_URL"]["source"]) == (
        "unix:///run/redis.sock",
        "running up",
    )
    assert found["DYN_REDIS_PREFIX"]["source"] == "running up"


def test_passwords_are_masked(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["settings"], ["settings", "--json"]):
        assert run([*arguments, "--redis-url", "redis://user:s3cret@host"]) == 0
        out = capsys.readouterr().out
        assert "redis://user:***@host" in out
        assert "s3cret" not in out


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["settings", "--lease-ttl", "20"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("DYN_LEASE_TTL_S"))
    assert line.split() == ["DYN_LEASE_TTL_S", "20", "s", "command", "line", "--lease-ttl"]


def test_a_wrong_value_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_LEASE_TTL_S", "abc")
    assert run(["settings"]) == 2
    assert capsys.readouterr() == (
        "",
        "dynamo-redis: DYN_LEASE_TTL_S: 'abc' is not a duration: write for example 10, 10s, 500ms or 2m\n",
    )


def test_the_page_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["settings", "--markdown"]) == 0
    assert capsys.readouterr().out == render() + "\n"


def test_a_key_is_never_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DYN_ENGINE_API_KEY", "sk-very-secret")
    assert rows(capsys)["DYN_ENGINE_API_KEY"]["value"] == "***"


def test_modalities_are_listed_with_commas(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "--engine-modalities", "Video, image")
    assert found["DYN_ENGINE_MODALITIES"]["value"] == "image,video"
    for wrong in ("smell", "image,", ""):
        assert run(["settings", "--engine-modalities", wrong]) == 2
        assert "none of image, audio, video" in capsys.readouterr().err


def test_unknown_parser_is_refused_with_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["worker", "mock", "--tool-call-parser", "mine"]) == 2
    error = capsys.readouterr().err
    assert "--tool-call-parser='mine'" in error
    assert "must be one of auto, none, deepseek_v3, " in error
    assert run(["worker", "openai", "--reasoning-parser", "mine"]) == 2
    assert "must be one of auto, none, basic, " in capsys.readouterr().err
