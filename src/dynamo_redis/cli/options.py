"""Command-line options made from settings: a declaration in `config/` is an option, its help and its check.

click reads no environment variable here and checks no value. The values go to `SettingsGroup.load`, which
applies the precedence (command line > environment > `.env` > default) and checks them.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import ByteSize, SecretStr
from pydantic.fields import FieldInfo

from dynamo_redis.cli.formats import human_size
from dynamo_redis.config import (
    GROUPS,
    PemFile,
    RuntimeSettings,
    SettingsGroup,
    StoreSettings,
    env_name,
    parse_duration,
    unit_of,
)
from dynamo_redis.errors import ConfigError

Group = TypeVar("Group", bound=SettingsGroup)
Command = TypeVar("Command", bound=Callable[..., Any])

_SUFFIXES = ("_s", "_bytes", "_count")  # units in field names; an option's help shows the unit
_NAMES = {
    "prefix": "--redis-prefix",  # `get --prefix` is the prefix of keys
    "wait_for_redis": "--wait",
}
_FURTHER_NAMES = {"kv_overlap_score_weight": ("--router-kv-overlap-score-credit",)}
"""Additional names of options, known from Dynamo."""
_METAVARS: dict[Any, str] = {
    int: "N",
    float: "NUMBER",
    ByteSize: "SIZE",
    Path: "DIR",
    PemFile: "FILE",
}


def option_name(field_name: str) -> str:
    """Return a field's option: `lease_ttl_s` → `--lease-ttl`, `use_kv_events` → `--kv-events`."""
    if field_name in _NAMES:
        return _NAMES[field_name]
    for suffix in _SUFFIXES:
        field_name = field_name.removesuffix(suffix)
    return "--" + field_name.removeprefix("use_").replace("_", "-")


class SettingOption(click.Option):
    """An option made from a setting. `section` is its heading in the help."""

    section = "Settings"


class Number(click.FloatRange):
    """A number in a range; unlike the base class, it refuses nan."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Raises BadParameter."""
        found = float(super().convert(value, param, ctx))
        if math.isnan(found):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return found


class SettingsCommand(click.Command):
    """A command whose help lists the settings below its own options, group by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, under a heading for each group."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                continue  # the usage line and the text describe it
            if (shown := parameter.get_help_record(ctx)) is not None:
                heading = parameter.section if isinstance(parameter, SettingOption) else "Options"
                sections.setdefault(heading, []).append(shown)
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def setting_options(
    group: type[SettingsGroup], *names: str, **defaults: object
) -> Callable[[Command], Command]:
    """Decorate a command with options for these settings of a group (all, if none is named).

    The command gets each value under its field name, as text (a flag as a bool), or None if the option was
    not given. `defaults` are the command's own defaults, for the help; the command must apply them.
    """
    fields = [(name, group.model_fields[name]) for name in names or group.model_fields]
    heading = section_title(group)
    option_class = type("GroupOption", (SettingOption,), {"section": heading})

    def decorate(command: Command) -> Command:
        for name, field in reversed(fields):
            option, default = option_name(name), _shown(field, defaults.get(name, field.default))
            source = f"{env_name(field)}; default {default}" if default else env_name(field)
            shape: dict[str, Any] = {"cls": option_class, "help": f"{field.description}  [{source}]"}
            kind = _bare(field.annotation)
            if kind is bool:
                spellings = (f"{option}/--no-{option.removeprefix('--')}",)
                shape |= {"is_flag": True, "default": None}  # None: the flag was not given
            else:
                spellings = (option, *_FURTHER_NAMES.get(name, ()))
                if typing.get_origin(kind) is typing.Literal:
                    shape["metavar"] = "|".join(map(str, typing.get_args(kind)))
                elif unit_of(field) == "s":
                    shape["metavar"] = "DURATION"
                elif kind is SecretStr:
                    shape["metavar"] = "URL" if env_name(field).endswith("_URL") else "TEXT"
                elif kind is Path and name.endswith("_file"):
                    shape["metavar"] = "FILE"
                else:
                    shape["metavar"] = _METAVARS.get(kind, "TEXT")
            command = click.option(*spellings, name, **shape)(command)
        return command

    return decorate


def duration_value(ctx: click.Context, param: click.Parameter, value: object) -> object:
    """Convert an option's duration to seconds, as a click callback. Raises BadParameter."""
    try:
        return parse_duration(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc


def all_setting_options(command: Command) -> Command:
    """Decorate a command with the options of every setting."""
    for group in reversed(GROUPS):
        command = setting_options(group)(command)
    return command


def store_options(command: Command) -> Command:
    """Decorate a command with the options that every command has: the registry and the log level."""
    command = setting_options(RuntimeSettings, "log")(command)
    return setting_options(StoreSettings, "redis_url", "prefix")(command)


def load(group: type[Group], given: Mapping[str, Any]) -> Group:
    """Read a group, with the values of the command line. Raises ConfigError, which names the wrong option or
    variable."""
    overrides = {name: value for name, value in given.items() if name in group.model_fields}
    try:
        return group.load(**overrides)
    except ConfigError as exc:
        message = str(exc)
        for name, value in overrides.items():
            env = env_name(group.model_fields[name])
            if value is not None and message.startswith((f"{env}=", f"{env}:")):
                raise ConfigError(option_name(name) + message.removeprefix(env)) from exc
        raise


def given_settings(group: type[SettingsGroup], given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return a group's values of the command line, by environment variable, for child processes."""
    for name, field in group.model_fields.items():
        if given.get(name) is not None:
            yield env_name(field), str(given[name])


def shown_default(field: FieldInfo) -> str:
    """Return a setting's default with its unit, as help and documentation show it; empty if it has none."""
    return _shown(field, field.default)


def _shown(field: FieldInfo, default: object) -> str:
    unit = unit_of(field)
    if default is None or default == "":
        return ""
    if isinstance(default, bool):
        return "true" if default else "false"
    if isinstance(default, ByteSize):
        return human_size(default)
    if isinstance(default, float):
        return f"{default:g} {unit}".strip()
    if isinstance(default, SecretStr):  # a default in the code is no secret
        return default.get_secret_value()
    return f"{default} {unit}".strip()


def section_title(group: type[SettingsGroup]) -> str:
    """Return the first line of the group's docstring up to the colon: `The request plane`."""
    return (group.__doc__ or group.__name__).splitlines()[0].rstrip(".").partition(":")[0]


def _bare(annotation: Any) -> Any:
    """Return the type `X` of `X | None` and `Annotated[X, …]`."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
    if typing.get_origin(annotation) is typing.Annotated:
        return _bare(typing.get_args(annotation)[0])
    return annotation
