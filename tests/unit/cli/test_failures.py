from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from dynamo_redis.cli import failures
from dynamo_redis.cli.app import run
from dynamo_redis.errors import ConfigError, StoreUnavailable
from tests.processes import PROGRAMS


@pytest.fixture(autouse=True)
def own_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DYN_LOG", raising=False)


@pytest.mark.parametrize(
    ("exc", "code", "line"),
    [
        (StoreUnavailable("no connection to redis://u:pw@h:1"), 1, "no connection to redis://u:***@h:1"),
        (ConfigError("DYN_X='y': no"), 2, "DYN_X='y': no"),
        (failures.CommandFailed("several\nlines"), 1, "several lines"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 1, "a/b: No such file or directory"),
        (ExceptionGroup("", [StoreUnavailable("away")]), 1, "away"),
        (click.ClickException("no"), 1, "no"),
        (RuntimeError("boo"), 1, "unexpected RuntimeError: boo (DYN_LOG=debug shows where)"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    exc: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failures.report(exc) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"dynamo-redis: {line}\n")


@pytest.mark.parametrize(
    ("exc", "code"), [(KeyboardInterrupt(), 130), (click.Abort(), 130), (SystemExit(3), 3)]
)
def test_being_stopped_is_no_error_message(
    exc: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failures.report(exc) == code
    assert capsys.readouterr() == ("", "")


def test_a_traceback_only_when_debugging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYN_LOG", "debug")
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("boo at redis://:pw@h")
    assert failures.report(caught.value) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "pw" not in err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nonsense"], "No such command 'nonsense'; see dynamo-redis --help"),
        (["get"], "give either a KEY or --prefix; see dynamo-redis get --help"),
        (["put", "only-a-key"], "Missing argument 'VALUE'; see dynamo-redis put --help"),
        (["settings", "--nope"], "No such option '--nope'; see dynamo-redis settings --help"),
        (["up", "--workers", "x"], "Invalid value for '--workers': 'x' is not a valid integer range"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"dynamo-redis: {line}"), err
    assert err.count("\n") == 1


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Look into the registry:" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = f"{sys.executable} -m dynamo_redis settings | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


@pytest.mark.parametrize("spelling", ["-h", "--help"])
def test_the_programs_help_imports_nothing_slow(spelling: str) -> None:
    code = (
        "import sys; from dynamo_redis.cli.app import run; run([sys.argv[1]]); "
        "print(sorted({'pydantic', 'redis', 'rich', 'asyncio', 'starlette', 'uvloop'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, spelling], capture_output=True, text=True, check=True)
    assert "Look into the registry:" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["settings"], ["instances"], ["worker", "mock"], ["up"]])
def test_a_dotenv_file_that_is_no_text_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".env").write_bytes(b"DYN_NAMESPACE=caf\xe9\n")
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"dynamo-redis: {tmp_path / '.env'} cannot be read: it is not UTF-8 text"), err
    assert err.count("\n") == 1


def test_unexpected_error_with_unreadable_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".env").write_bytes(b"DYN_LOG=\xff\n")
    assert failures.report(RuntimeError("boo")) == 1
    assert (
        capsys.readouterr().err == "dynamo-redis: unexpected RuntimeError: boo (DYN_LOG=debug shows where)\n"
    )


WITHOUT_EXTRAS = PROGRAMS / "without_extras.py"


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["worker", "mock"], "http"),
        (["frontend", "--http-port", "0"], "http"),
        (["frontend", "--http-port", "0", "--kserve-grpc-server"], "kserve"),  # which brings http along
        (["worker", "openai", "--model-path", "."], "engines"),  # which brings http along
    ],
)
def test_a_missing_extra_is_named_with_how_to_install_it(
    arguments: list[str], extra: str, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    store = ["--redis-url", dynamo_redis_url, "--redis-prefix", dynamo_redis_prefix]
    done = subprocess.run(
        [sys.executable, WITHOUT_EXTRAS, *arguments, *store, "--log", "warn"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("dynamo-redis: this needs further packages ("), done.stderr
    assert done.stderr.endswith(f"): pip install 'dynamo-redis[{extra}]'\n")
    assert done.stderr.count("\n") == 1


def test_extras_name_no_core_dependency(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    core = {re.split(r"[\[>;=]", requirement)[0] for requirement in project["dependencies"]}
    assert failures._EXTRAS.keys() <= project["optional-dependencies"].keys()
    assert [module for modules in failures._EXTRAS.values() for module in modules if module in core] == []


def test_another_missing_module_is_not_taken_for_an_extra(capsys: pytest.CaptureFixture[str]) -> None:
    assert failures.report(ModuleNotFoundError("No module named 'nonsense'", name="nonsense")) == 1
    assert "unexpected ModuleNotFoundError" in capsys.readouterr().err
