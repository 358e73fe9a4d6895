"""Settings of the store."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, SecretStr

from dynamo_redis.config.base import Duration, SettingsGroup, setting
from dynamo_redis.config.runtime_files import read_runtime_file
from dynamo_redis.errors import ConfigError


def _check_prefix(value: str) -> str:
    if not re.fullmatch(r"[^{}\s]{1,64}", value):
        raise ValueError("must be 1 to 64 characters, without braces and spaces")
    return value


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
        return settings.model_copy(update=found)

    def require_url(self) -> str:
        """Return the server's URL. Raises ConfigError if there is none."""
        if self.redis_url is None:
            raise ConfigError(
                "no Redis is configured: set DYN_REDIS_URL (or --redis-url) to redis://host:6379, "
                "or run `dynamo-redis up`, which starts one"
            )
        return self.redis_url.get_secret_value()
