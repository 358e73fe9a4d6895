"""`dynamo-redis settings`: every setting, its value, and the source of the value."""

from __future__ import annotations

from typing import Any

import click
from pydantic import ByteSize, SecretStr

from dynamo_redis.cli.formats import HIDDEN, human_size, redact
from dynamo_redis.cli.options import SettingsCommand, all_setting_options, load, option_name
from dynamo_redis.cli.output import json_option, print_json, print_line, print_table
from dynamo_redis.cli.settings_page import render
from dynamo_redis.config import GROUPS, SettingsGroup, env_name, origins, unit_of


@click.command("settings", cls=SettingsCommand)
@json_option
@click.option("--markdown", is_flag=True, help="Print the tables of docs/settings.md instead.")
@all_setting_options
def settings(as_json: bool, markdown: bool, **options: str | None) -> None:
    """List every setting: its variable, its value with the unit, the source of the value, and its option.

    The command line has precedence over the environment, the environment over a `.env` file in the working
    directory, and the file over the default. Passwords are masked.

    \b
    Examples:
      dynamo-redis settings
      DYN_LEASE_TTL_S=30s dynamo-redis settings
      dynamo-redis settings --json | jq '.[] | select(.source != "default")'
    """
    if markdown:
        print_line(render())
        return
    rows = [row for group in GROUPS for row in describe(group, options)]
    if as_json:
        print_json(rows)
        return
    table = []
    for row in rows:
        value, unit = row["value"], row["unit"]
        if value is None:
            shown = "-"
        elif isinstance(value, ByteSize):
            shown = human_size(value)
        else:
            shown = f"{value:g} {unit}" if isinstance(value, float) else f"{value} {unit}".strip()
        table.append([row["env"], shown, row["source"], row["option"]])
    print_table(["SETTING", "VALUE", "SOURCE", "OPTION"], table, empty="")


def describe(group: type[SettingsGroup], options: dict[str, str | None]) -> list[dict[str, Any]]:
    """Return the settings of a group with their present values. Raises ConfigError for a wrong value."""
    loaded = load(group, options)
    sources = origins(group, {name for name, value in options.items() if value is not None})
    rows = []
    for name, field in group.model_fields.items():
        value = getattr(loaded, name)
        source: str = sources[name]
        if source == "default" and value != field.default:
            source = "running up"
        if isinstance(value, SecretStr):
            text = value.get_secret_value()
            # A URL is shown without its password, any other secret not at all.
            is_url = "://" in text and not any(c.isspace() or c in "'\"" for c in text)
            value = redact(text) if is_url else HIDDEN
        rows.append(
            {
                "env": env_name(field),
                "option": option_name(name),
                "value": value,
                "unit": unit_of(field),
                "source": source,
                "description": field.description,
            }
        )
    return rows
