"""Options made from settings: one declaration in `config/` is an option, its help, and its check.

click reads no environment here and checks no value: what was given goes to `SettingsGroup.load`, which
knows the precedence (command line > environment > `.env` > default) and what a right value is.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import ByteSize, SecretStr
from pydantic.fields import FieldInfo

from dynamo_redis.cli.formats import human_size
from dynamo_redis.config import PemFile, RuntimeSettings, SettingsGroup, StoreSettings, env_name, unit_of
from dynamo_redis.errors import ConfigError

Group = TypeVar("Group", bound=SettingsGroup)
Command = TypeVar("Command", bound=Callable[..., Any])

_SUFFIXES = ("_s", "_bytes", "_count")  # of field names: units, which an option's help says instead
_NAMES = {
    "prefix": "--redis-prefix",  # beside `get --prefix`, which is about keys
    "wait_for_redis": "--wait",
}
_FURTHER_NAMES = {"kv_overlap_score_weight": ("--router-kv-overlap-score-credit",)}
"""Other names that users of Dynamo know an option by."""
_METAVARS: dict[Any, str] = {
    int: "N",
    float: "NUMBER",
    ByteSize: "SIZE",
    Path: "DIR",
    PemFile: "FILE",
}


def option_name(field_name: str) -> str:
    """`lease_ttl_s` → `--lease-ttl`, `use_kv_events` → `--kv-events`."""
    if field_name in _NAMES:
        return _NAMES[field_name]
    for suffix in _SUFFIXES:
        field_name = field_name.removesuffix(suffix)
    return "--" + field_name.removeprefix("use_").replace("_", "-")


class SettingOption(click.Option):
    """An option made from a setting. `section` is the heading it stands under in the help."""

    section = "Settings"


class SettingsCommand(click.Command):
    """A command whose help lists the settings below its own options, group by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, under a heading for each group."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                continue  # the usage line names it, the text explains it
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

    The command gets each under its field name, as text (a flag as a bool), or None if it was not given.
    `defaults` are those of the command's own that differ: they are shown, the command sees to them.
    """
    fields = [(name, group.model_fields[name]) for name in names or group.model_fields]
    heading = section_title(group)
    option_class = type("GroupOption", (SettingOption,), {"section": heading})

    def decorate(command: Command) -> Command:
        for name, field in reversed(fields):
            shape = _shape(field, defaults.get(name, field.default))
            command = click.option(*_spellings(name, field), name, cls=option_class, **shape)(command)
        return command

    return decorate


def store_options(command: Command) -> Command:
    """The options of every command: where the registry is, and how much to log."""
    command = setting_options(RuntimeSettings, "log")(command)
    return setting_options(StoreSettings, "redis_url", "prefix")(command)


def load(group: type[Group], given: Mapping[str, Any]) -> Group:
    """Read a group, with what was given on the command line. Raises ConfigError naming the option or the
    variable that is wrong."""
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
    """What was given on the command line for a group, by environment name: for child processes."""
    for name, field in group.model_fields.items():
        if given.get(name) is not None:
            yield env_name(field), str(given[name])


def shown_default(field: FieldInfo) -> str:
    """A setting's default with its unit, as help and documentation show it; empty if there is none."""
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
    if isinstance(default, SecretStr):  # a default is in the code, and no secret
        return default.get_secret_value()
    return f"{default} {unit}".strip()


def section_title(group: type[SettingsGroup]) -> str:
    """`PlaneSettings` → its docstring's first sentence up to the colon: `The request plane`."""
    return (group.__doc__ or group.__name__).splitlines()[0].rstrip(".").partition(":")[0]


def _help(field: FieldInfo, default: object) -> str:
    shown = _shown(field, default)
    source = f"{env_name(field)}; default {shown}" if shown else env_name(field)
    return f"{field.description}  [{source}]"


def _spellings(name: str, field: FieldInfo) -> tuple[str, ...]:
    option = option_name(name)
    if _bare(field.annotation) is bool:
        return (f"{option}/--no-{option.removeprefix('--')}",)
    return (option, *_FURTHER_NAMES.get(name, ()))


def _shape(field: FieldInfo, default: object) -> dict[str, Any]:
    """What click is told of an option: None stands for one that is not given, also of a flag."""
    if _bare(field.annotation) is bool:
        return {"help": _help(field, default), "is_flag": True, "default": None}
    return {"help": _help(field, default), "metavar": _metavar(field)}


def _metavar(field: FieldInfo) -> str:
    kind = _bare(field.annotation)
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if unit_of(field) == "s":
        return "DURATION"
    if kind is SecretStr:
        return "URL" if env_name(field).endswith("_URL") else "TEXT"
    return _METAVARS.get(kind, "TEXT")


def _bare(annotation: Any) -> Any:
    """The type within `X | None` and `Annotated[X, …]`."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
    if typing.get_origin(annotation) is typing.Annotated:
        return _bare(typing.get_args(annotation)[0])
    return annotation
