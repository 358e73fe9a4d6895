"""Declaring and reading settings: units, precedence, and errors of one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, NewType, Self

from pydantic import BeforeValidator, ByteSize, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from dynamo_redis.errors import ConfigError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(value: object) -> object:
    """`"10"`, `"10s"`, `"500ms"`, `"2m"`, `"1h"` → float seconds. Other types are returned unchanged."""
    if not isinstance(value, str):
        return value
    found = _DURATION.fullmatch(value.strip().lower())
    if found is None:
        raise ValueError(f"{value!r} is not a duration: write for example 10, 10s, 500ms or 2m")
    return float(found[1]) * _SECONDS[found[2] or "s"]


Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0)]
Size = ByteSize
Port = Annotated[int, Field(ge=0, le=65535)]
PemFile = NewType("PemFile", Path)


def setting(env: str, default: Any, description: str, *, unit: str = "") -> Any:
    """Declare a setting: its environment variable, default, meaning and unit, which `--help` shows."""
    return Field(
        default,
        validation_alias=env,
        description=description,
        json_schema_extra={"unit": unit} if unit else None,
    )


class SettingsGroup(BaseSettings):
    """Base of the groups.

    Frozen. Arguments have the fields' names, environment variables their `DYN_…` names.
    """

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True, populate_by_name=True
    )

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the group. Overrides that are None are ignored. Raises ConfigError."""
        try:
            return cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as exc:
            error = exc.errors(include_url=False)[0]
            name = str(error["loc"][0]) if error["loc"] else cls.__name__
            env = next((env_name(f) for n, f in cls.model_fields.items() if name in (n, env_name(f))), name)
            secret = any(
                env_name(field) == env and field.annotation is not str and "Secret" in str(field.annotation)
                for field in cls.model_fields.values()
            )
            unit = next((unit_of(f) for f in cls.model_fields.values() if env_name(f) == env), "")
            reason = error["msg"].removeprefix("Value error, ")
            words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
            for bound, limit in error.get("ctx", {}).items():
                if bound in words:
                    reason = f"must be {words[bound]} {limit:g} {unit}".rstrip()
                    break
            shown = "" if secret or repr(error["input"]) in reason else f"={error['input']!r}"
            raise ConfigError(f"{env}{shown}: {reason}") from exc
        except (UnicodeDecodeError, OSError) as exc:
            raise unreadable_dotenv(exc) from exc


def unreadable_dotenv(exc: Exception) -> ConfigError:
    """Make the error for a `.env` file in the working directory that cannot be read."""
    reason = exc.strerror if isinstance(exc, OSError) else f"it is not UTF-8 text: {exc}"
    return ConfigError(f"{Path.cwd() / '.env'} cannot be read: {reason}")


def env_name(field: FieldInfo) -> str:
    """Return the environment variable of a setting."""
    return str(field.validation_alias)


def unit_of(field: FieldInfo) -> str:
    """Return the unit of a setting's value, or an empty string."""
    extra = field.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""
