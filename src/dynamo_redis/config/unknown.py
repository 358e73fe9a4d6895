"""Variables that look like settings and are not, most often because of a spelling mistake."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection

from pydantic_settings import DotEnvSettingsSource

from dynamo_redis.config.base import SettingsGroup, unreadable_dotenv

_PREFIX = "DYN_"
_LEAST_SIMILARITY = 0.8
"""Least similarity of a name and the setting that may be meant by it; 1.0 is equality."""


def unknown_names(known: Collection[str]) -> dict[str, str | None]:
    """Return the `DYN_…` variables of the environment and of `.env` that are not `known`.

    Each has the known name that may be meant, or None. Raises ConfigError if `.env` cannot be read.
    """
    try:
        in_file = DotEnvSettingsSource(SettingsGroup).env_vars
    except (UnicodeDecodeError, OSError) as exc:
        raise unreadable_dotenv(exc) from exc
    given = {name.upper() for name in (*os.environ, *in_file)}
    found = sorted(name for name in given if name.startswith(_PREFIX) and name not in known)
    return {
        name: next(iter(difflib.get_close_matches(name, known, 1, _LEAST_SIMILARITY)), None) for name in found
    }
