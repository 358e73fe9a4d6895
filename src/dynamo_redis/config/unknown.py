"""Variables that look like settings and are none: most often one that is spelt wrongly."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection

from pydantic_settings import DotEnvSettingsSource

from dynamo_redis.config.base import SettingsGroup, unreadable_dotenv

_BEGINNING = "DYN_"
_ALIKE = 0.8
"""How alike two names are of which one may be meant for the other: 1.0 is the same."""


def unknown_names(known: Collection[str]) -> dict[str, str | None]:
    """The `DYN_…` variables, of the environment and of `.env`, that are not `known`: each with the name that
    may be meant. Raises ConfigError if `.env` cannot be read."""
    try:
        in_file = DotEnvSettingsSource(SettingsGroup).env_vars
    except (UnicodeDecodeError, OSError) as exc:
        raise unreadable_dotenv(exc) from exc
    given = {name.upper() for name in (*os.environ, *in_file)}
    found = sorted(name for name in given if name.startswith(_BEGINNING) and name not in known)
    return {name: next(iter(difflib.get_close_matches(name, known, 1, _ALIKE)), None) for name in found}
