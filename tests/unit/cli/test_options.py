from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dynamo_redis.cli.app import SECTIONS, program
from dynamo_redis.cli.options import given_settings, load, option_name, setting_options, shown_default
from dynamo_redis.config import (
    GROUPS,
    FixtureSettings,
    FrontendSettings,
    ModelSettings,
    PlaneSettings,
    RouterSettings,
    RuntimeSettings,
    SettingsGroup,
    StoreSettings,
)
from dynamo_redis.errors import ConfigError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # no `.env` of the checkout
    for group in GROUPS:
        for field in group.model_fields.values():
            monkeypatch.delenv(str(field.validation_alias), raising=False)


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield every command of the program that is no group, by its full name."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command, info_name=path)
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        yield from commands(child, f"{path} {name}")


ALL_COMMANDS = dict(commands(program, "dynamo-redis"))
WITHOUT_SERVER = {"dynamo-redis acl"}
"""Commands that connect to no server."""


def test_every_entry_of_the_help_is_a_command_of_that_name() -> None:
    context = click.Context(program)
    for section in SECTIONS.values():
        for name, entry in section.items():
            command = program.get_command(context, name)
            assert command is not None
            assert command.name == name
            assert entry.summary
    assert program.get_command(context, "nonsense") is None


@pytest.mark.parametrize("path", ALL_COMMANDS)
def test_every_command_teaches_itself(path: str) -> None:
    command = ALL_COMMANDS[path]
    context = click.Context(command, info_name=path)
    text = command.get_help(context)
    assert f"{path}" in (command.help or ""), "no example in the help"
    assert "Example" in text
    spellings = Counter(spelling for option in command.params for spelling in option.opts)
    assert [spelling for spelling, count in spellings.items() if count > 1] == []
    names = Counter(option.name for option in command.params)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", [path for path in ALL_COMMANDS if path not in WITHOUT_SERVER])
def test_every_command_has_registry_and_log_options(path: str) -> None:
    options = {spelling for option in ALL_COMMANDS[path].params for spelling in option.opts}
    assert {"--redis-url", "--redis-prefix", "--log"} <= options


def test_help_shows_meaning_variable_unit_and_default() -> None:
    @click.command()
    @setting_options(StoreSettings, "lease_ttl_s")
    @setting_options(FrontendSettings, "max_body_bytes", "router_mode")
    def command(**_: str) -> None: ...

    text = " ".join(
        command.get_help(click.Context(command, max_content_width=300, terminal_width=300)).split()
    )
    assert "--lease-ttl DURATION" in text
    assert (
        "A process that has not renewed its lease for this time is removed from the registry. "
        "[DYN_LEASE_TTL_S; default 10 s]" in text
    )
    assert "--max-body SIZE" in text
    assert "[DYN_HTTP_BODY_LIMIT; default 45 MiB]" in text
    assert "--router-mode round_robin|random|p2c|least_loaded" in text


def test_every_setting_has_one_option_name_and_one_variable() -> None:
    fields = [(name, field) for group in GROUPS for name, field in group.model_fields.items()]
    options = Counter(option_name(name) for name, _ in fields)
    variables = Counter(str(field.validation_alias) for _, field in fields)
    assert [name for name, count in (options + variables).items() if count > 1] == []
    assert all(field.description for _, field in fields)
    assert all("PydanticUndefined" not in shown_default(field) for _, field in fields)


def test_options_for_files_say_so() -> None:
    fields = [(group, name) for group in GROUPS for name in group.model_fields if name.endswith("_file")]
    assert len(fields) > 1
    for group, name in fields:
        shown = CliRunner().invoke(
            click.command()(setting_options(group, name)(lambda **_: None)), ["--help"]
        )
        assert f"{option_name(name)} FILE" in shown.output


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], {}),
        (["--no-kv-events"], {"DYN_KV_EVENTS": "False"}),
        (
            ["--kv-events", "--router-reset-states"],
            {"DYN_KV_EVENTS": "True", "DYN_ROUTER_RESET_STATES": "True"},
        ),
        (["--router-kv-overlap-score-credit", "2"], {"DYN_KV_OVERLAP_SCORE_WEIGHT": "2"}),
    ],
)
def test_flags_come_in_pairs_and_reach_child_processes(arguments: list[str], given: dict[str, str]) -> None:
    told: dict[str, str] = {}

    @click.command()
    @setting_options(RouterSettings)
    def command(**options: str | None) -> None:
        told.update(given_settings(RouterSettings, options))
        expected = RouterSettings.load(
            **{name: value for name, value in options.items() if value is not None}
        )
        assert load(RouterSettings, options) == expected

    command.main(arguments, standalone_mode=False)
    assert told == given
    # A child reads them from its environment.
    assert RouterSettings(**given).use_kv_events == (given.get("DYN_KV_EVENTS") != "False")  # type: ignore[arg-type]


def test_up_chooses_by_kv_caches_and_a_frontend_does_not() -> None:
    def shown(path: str) -> str:
        command = ALL_COMMANDS[path]
        return " ".join(command.get_help(click.Context(command, info_name=path)).split())

    assert "[DYN_ROUTER_MODE; default kv]" in shown("dynamo-redis up")
    assert "[DYN_ROUTER_MODE; default round_robin]" in shown("dynamo-redis frontend")


def test_precedence_of_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def value(**given: str) -> float:
        return load(StoreSettings, given).lease_ttl_s

    assert value() == 10
    Path(".env").write_text("DYN_LEASE_TTL_S=11\n")
    assert value() == 11
    monkeypatch.setenv("DYN_LEASE_TTL_S", "12s")
    assert value() == 12
    assert value(lease_ttl_s="13000ms") == 13


def test_an_error_names_the_option_or_the_variable_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^--lease-ttl: 'abc' is not a duration"):
        load(StoreSettings, {"lease_ttl_s": "abc"})
    with pytest.raises(ConfigError, match=r"^--tcp-port='x': "):
        load(PlaneSettings, {"tcp_port": "x"})
    monkeypatch.setenv("DYN_LEASE_TTL_S", "abc")
    with pytest.raises(ConfigError, match=r"^DYN_LEASE_TTL_S: 'abc' is not a duration"):
        load(StoreSettings, {"lease_ttl_s": None})


def test_options_of_another_group_are_left_to_it() -> None:
    given = {"log": "debug", "lease_ttl_s": "20", "nonsense": "x"}
    assert load(RuntimeSettings, given).log == "debug"
    assert dict(given_settings(StoreSettings, given)) == {"DYN_LEASE_TTL_S": "20"}
    assert dict(given_settings(FrontendSettings, given)) == {}


@pytest.mark.parametrize(
    ("group", "given", "message"),
    [
        (StoreSettings, {"lease_ttl_s": "1ms"}, "--lease-ttl='1ms': must be at least 1 s"),
        (StoreSettings, {"lease_ttl_s": "2h"}, "--lease-ttl='2h': must be at most 3600 s"),
        (StoreSettings, {"command_timeout_s": "0"}, "--command-timeout='0': must be more than 0 s"),
        (PlaneSettings, {"tcp_port": "70000"}, "--tcp-port='70000': must be at most 65535"),
        (
            StoreSettings,
            {"prefix": "f1{x}"},
            "='f1{x}': must be 1 to 64 characters, without braces and spaces",
        ),
        (StoreSettings, {"prefix": "a b"}, "without braces and spaces"),
        (StoreSettings, {"prefix": "x" * 65}, "1 to 64 characters"),
        (ModelSettings, {"model_path": ""}, "--model-path='': must name a directory"),
        (FixtureSettings, {"dynamo_redis": "memcached"}, "must be auto, container, path, wheel, or a URL"),
    ],
)
def test_wrong_value_is_explained_with_its_unit(
    group: type[SettingsGroup], given: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(group, given)
    assert message in str(error.value)
