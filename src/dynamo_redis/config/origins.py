"""The source of a setting's value, and the environment of child processes."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Literal

from pydantic_settings import DotEnvSettingsSource, EnvSettingsSource

from dynamo_redis.config.base import SettingsGroup, env_name, unreadable_dotenv

Origin = Literal["command line", "environment", ".env", "default"]


def origins(group: type[SettingsGroup], given: Collection[str] = ()) -> dict[str, Origin]:
    """Return the source of each field's value, by field name. `given` are the fields on the command line.

    Raises ConfigError if the `.env` file cannot be read.
    """
    try:
        environment, dotenv = EnvSettingsSource(group)(), DotEnvSettingsSource(group)()
    except (UnicodeDecodeError, OSError) as exc:
        raise unreadable_dotenv(exc) from exc

    def origin(name: str, env: str) -> Origin:
        if name in given:
            return "command line"
        if env in environment:
            return "environment"
        return ".env" if env in dotenv else "default"

    return {name: origin(name, env_name(field)) for name, field in group.model_fields.items()}


def child_environment(values: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment, with these settings (by `DYN_…` name) in place of its own.

    Child processes get settings this way and not as arguments, which every user of the machine can read.
    """
    replaced = {name.upper() for name in values}
    return {name: value for name, value in os.environ.items() if name.upper() not in replaced} | dict(values)
