"""Settings of the store."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, SecretStr

from dynamo_redis.config.base import Duration, SettingsGroup, setting
from dynamo_redis.config.runtime_files import read_runtime_file
from dynamo_redis.errors import ConfigError

_LOGIN = (
    "redis_username",
    "redis_password",
    "redis_username_file",
    "redis_password_file",
    "redis_credentials",
)


def _check_prefix(value: str) -> str:
    if not re.fullmatch(r"[^{}\s]{1,64}", value):
        raise ValueError("must be 1 to 64 characters, without braces and spaces")
    return value


@dataclass(frozen=True, slots=True)
class RedisLogin:
    """User and password of Redis that do not stand in its URL. At most one of `password`, `password_file` and
    `provider` is set.

    `password_file` and `username_file` are read again when they change. `provider` names an object that gives
    both: `module:name`.
    """

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    username_file: Path | None = None
    password_file: Path | None = None
    provider: str | None = None

    @property
    def changes(self) -> bool:
        """True if user and password may become other ones while a process lives."""
        return self.provider is not None or self.password_file is not None

    @property
    def origin(self) -> str:
        """The setting that the password is from, for messages."""
        if self.provider is not None:
            return f"DYN_REDIS_CREDENTIALS ({self.provider})"
        if self.password_file is not None:
            return f"DYN_REDIS_PASSWORD_FILE ({self.password_file})"
        return "DYN_REDIS_URL" if self.password is None else "DYN_REDIS_PASSWORD"


class StoreSettings(SettingsGroup):
    """The registry: its server, the prefix of its keys, and the lease of a process."""

    redis_url: SecretStr | None = setting(
        "DYN_REDIS_URL",
        None,
        "The Redis or Valkey server: redis://[user:password@]host:port, rediss://… for TLS, unix:///path, "
        "redis+sentinel://[user:password@]sentinel1:26379,sentinel2:26379/master-name, "
        "redis+cluster://[user:password@]node1:6379,node2:6379. "
        "Unset: the server that `dynamo-redis up` of this user runs.",
    )
    redis_username: str | None = setting(
        "DYN_REDIS_USERNAME", None, "The user at Redis, where DYN_REDIS_URL names none."
    )
    redis_password: SecretStr | None = setting(
        "DYN_REDIS_PASSWORD", None, "The password at Redis, where DYN_REDIS_URL has none."
    )
    redis_username_file: Path | None = setting(
        "DYN_REDIS_USERNAME_FILE", None, "File with the user at Redis, beside DYN_REDIS_PASSWORD_FILE."
    )
    redis_password_file: Path | None = setting(
        "DYN_REDIS_PASSWORD_FILE",
        None,
        "File with the password at Redis. It is read again when it changes, without a restart.",
    )
    redis_credentials: str | None = setting(
        "DYN_REDIS_CREDENTIALS",
        None,
        "Program that gives user and password, for tokens that end: module:name of a function, or of a "
        "CredentialProvider of redis-py (docs/managed-redis.md).",
    )
    prefix: Annotated[str, AfterValidator(_check_prefix)] = setting(
        "DYN_REDIS_PREFIX", "dynamo", "First part of every key. Each prefix is a registry of its own."
    )
    lease_ttl_s: Annotated[Duration, Field(ge=1, le=3600)] = setting(
        "DYN_LEASE_TTL_S",
        10.0,
        "A process that has not renewed its lease for this time is removed from the registry.",
        unit="s",
    )
    loop_stall_s: Duration = setting(
        "DYN_LOOP_STALL_S",
        120.0,
        "A process whose event loop hangs for this time gives up its lease and its requests. 0: never.",
        unit="s",
    )
    command_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_REDIS_TIMEOUT_S", 3.0, "Longest time that Redis sends nothing while a reply is due.", unit="s"
    )

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the group. Without a server it takes that of a running `dynamo-redis up`, with its prefix."""
        settings = super().load(**overrides)
        if settings.redis_url is not None:
            return settings
        running = read_runtime_file()
        if "redis_url" not in running:
            return settings
        found: dict[str, Any] = {"redis_url": SecretStr(running["redis_url"])}
        if "prefix" in running and "prefix" not in settings.model_fields_set:
            found["prefix"] = running["prefix"]
        # Its URL has the password of its own server.
        found |= dict.fromkeys(_LOGIN)
        return settings.model_copy(update=found)

    def login(self) -> RedisLogin | None:
        """Return the user and password that stand beside the URL; None without any. Raises ConfigError."""
        passwords = {
            "DYN_REDIS_PASSWORD": self.redis_password,
            "DYN_REDIS_PASSWORD_FILE": self.redis_password_file,
            "DYN_REDIS_CREDENTIALS": self.redis_credentials,
        }
        given = [name for name, value in passwords.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"give one of {' and '.join(given)}")
        if self.redis_username_file is not None and (
            self.redis_username is not None or self.redis_password_file is None
        ):
            raise ConfigError(
                "DYN_REDIS_USERNAME_FILE goes with DYN_REDIS_PASSWORD_FILE, and without DYN_REDIS_USERNAME"
            )
        if not given and self.redis_username is None:
            return None
        return RedisLogin(
            self.redis_username,
            None if self.redis_password is None else self.redis_password.get_secret_value(),
            self.redis_username_file,
            self.redis_password_file,
            self.redis_credentials,
        )

    def require_url(self) -> str:
        """Return the server's URL. Raises ConfigError if there is none."""
        if self.redis_url is None:
            raise ConfigError(
                "no Redis is configured: set DYN_REDIS_URL (or --redis-url) to redis://host:6379, "
                "or run `dynamo-redis up`, which starts one"
            )
        return self.redis_url.get_secret_value()
