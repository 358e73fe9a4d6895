"""Settings: the only reader of the environment.

Each group of settings is a frozen pydantic model. A value comes, in this order, from the arguments given
to `load` (the command line), the environment, a `.env` file in the working directory, the default. Sizes
and durations accept units (`32MiB`, `10s`, `500ms`). A wrong value is a `ConfigError` of one line that
names the setting.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import platformdirs
from pydantic import BeforeValidator, ByteSize, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from dynamo_redis.errors import ConfigError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}

REQUEST_PLANES = ("tcp", "http", "nats", "redis")


def parse_duration(value: object) -> object:
    """`"10"`, `"10s"`, `"500ms"`, `"2m"`, `"1h"` → float seconds. What is not a string passes unchanged."""
    if not isinstance(value, str):
        return value
    found = _DURATION.fullmatch(value.strip().lower())
    if found is None:
        raise ValueError(f"{value!r} is not a duration: write for example 10, 10s, 500ms or 2m")
    return float(found[1]) * _SECONDS[found[2] or "s"]


def _parse_request_plane(value: object) -> object:
    if isinstance(value, str) and value.lower() in REQUEST_PLANES:
        return value.lower()
    raise ValueError(f"Invalid request plane mode: {value!r}. Valid options are: {', '.join(REQUEST_PLANES)}")


Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0)]
Size = ByteSize
RequestPlane = Annotated[Literal["tcp", "http", "nats", "redis"], BeforeValidator(_parse_request_plane)]
Port = Annotated[int, Field(ge=0, le=65535)]


def setting(env: str, default: Any, description: str, *, unit: str = "") -> Any:
    """Declare a setting: its environment variable, default, meaning and unit (what `--help` shows)."""
    return Field(
        default,
        validation_alias=env,
        description=description,
        json_schema_extra={"unit": unit} if unit else None,
    )


class SettingsGroup(BaseSettings):
    """Base of the groups. Frozen; arguments go by field name, the environment by `DYN_…` name."""

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True, populate_by_name=True
    )

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the group. Overrides that are None are left out. Raises ConfigError."""
        try:
            return cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as exc:
            raise ConfigError(cls._explain(exc)) from exc

    @classmethod
    def _explain(cls, exc: ValidationError) -> str:
        error = exc.errors(include_url=False)[0]
        name = str(error["loc"][0]) if error["loc"] else cls.__name__
        env = next((env_name(f) for n, f in cls.model_fields.items() if name in (n, env_name(f))), name)
        secret = any(
            env_name(field) == env and field.annotation is not str and "Secret" in str(field.annotation)
            for field in cls.model_fields.values()
        )
        reason = error["msg"].removeprefix("Value error, ")
        shown = "" if secret or repr(error["input"]) in reason else f"={error['input']!r}"
        return f"{env}{shown}: {reason}"


def env_name(field: FieldInfo) -> str:
    """The environment variable of a setting."""
    return str(field.validation_alias)


def unit_of(field: FieldInfo) -> str:
    """The unit of a setting's value, or an empty string."""
    extra = field.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


class StoreSettings(SettingsGroup):
    """Where the registry is, and how long a lease lives."""

    redis_url: SecretStr | None = setting(
        "DYN_REDIS_URL",
        None,
        "The Redis or Valkey server: redis://[user:password@]host:port, rediss://… for TLS, unix:///path. "
        "Unset: the server that `dynamo-redis up` of this user runs.",
    )
    prefix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^{}\s]+$")] = setting(
        "DYN_REDIS_PREFIX", "dynamo", "First part of every key: one registry a prefix."
    )
    lease_ttl_s: Annotated[Duration, Field(ge=1, le=3600)] = setting(
        "DYN_LEASE_TTL_S", 10.0, "A process silent for so long is removed from the registry.", unit="s"
    )
    loop_stall_s: Duration = setting(
        "DYN_LOOP_STALL_S",
        120.0,
        "A process whose event loop hangs for so long gives up its lease.",
        unit="s",
    )
    command_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_REDIS_TIMEOUT_S", 3.0, "Longest wait for one answer from Redis.", unit="s"
    )

    def require_url(self) -> str:
        """The server's URL, from the setting or from a running `dynamo-redis up`. Raises ConfigError."""
        if self.redis_url is not None:
            return self.redis_url.get_secret_value()
        url = read_runtime_file().get("redis_url")
        if url is None:
            raise ConfigError(
                "no Redis is configured: set DYN_REDIS_URL (or --redis-url) to redis://host:6379, "
                "or run `dynamo-redis up`, which starts one"
            )
        return url


class PlaneSettings(SettingsGroup):
    """The request plane: how requests reach workers."""

    request_plane: RequestPlane = setting(
        "DYN_REQUEST_PLANE", "tcp", "How requests travel: tcp, http, nats or redis."
    )
    tcp_host: str | None = setting(
        "DYN_TCP_RPC_HOST",
        None,
        "Address to listen on. Unset: all interfaces, or loopback if Redis is local.",
    )
    tcp_port: Port = setting("DYN_TCP_RPC_PORT", 0, "Port to listen on; 0 takes a free one.")
    tcp_advertise_host: str | None = setting(
        "DYN_TCP_ADVERTISE_HOST", None, "Address that others dial, behind NAT or in a container."
    )
    tcp_advertise_port: Port | None = setting(
        "DYN_TCP_ADVERTISE_PORT", None, "Port that others dial. Unset: the one listened on."
    )
    max_message_bytes: Size = setting(
        "DYN_TCP_MAX_MESSAGE_SIZE", ByteSize(32 << 20), "Largest request or response item.", unit="bytes"
    )
    accept_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_TCP_REQUEST_TIMEOUT", 10.0, "Longest wait until a worker accepts a request.", unit="s"
    )
    pool_size: Annotated[int, Field(ge=1, le=1000)] = setting(
        "DYN_TCP_POOL_SIZE", 50, "Most connections to one instance; requests share them."
    )
    connect_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_TCP_CONNECT_TIMEOUT", 3.0, "Longest wait for a connection, with its handshake.", unit="s"
    )
    channel_buffer_count: Annotated[int, Field(ge=1)] = setting(
        "DYN_TCP_CHANNEL_BUFFER", 100, "Items a response stream may be ahead of its reader.", unit="items"
    )
    keepalive_interval_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_TCP_KEEPALIVE_S",
        1.0,
        "A connection with requests under way, silent for so long, is probed; "
        "silent for so long again, it is dead.",
        unit="s",
    )
    max_in_flight_count: Annotated[int, Field(ge=1)] = setting(
        "DYN_TCP_MAX_IN_FLIGHT", 4096, "Most requests a worker handles at once.", unit="requests"
    )
    max_queued_count: Annotated[int, Field(ge=0)] = setting(
        "DYN_TCP_MAX_QUEUED",
        4096,
        "Most requests a worker keeps waiting; past that it answers Overloaded.",
        unit="requests",
    )
    max_connections_count: Annotated[int, Field(ge=1)] = setting(
        "DYN_TCP_MAX_CONNECTIONS", 16384, "Most connections a worker accepts.", unit="connections"
    )
    auth: Literal["secret", "off"] = setting(
        "DYN_PLANE_AUTH",
        "secret",
        "secret: callers prove that they may read the registry; off: anyone may call.",
    )


class RuntimeSettings(SettingsGroup):
    """What a process does at start and at shutdown, and what it logs."""

    namespace: str = setting("DYN_NAMESPACE", "dynamo", "Namespace of the endpoints.")
    drain_s: Duration = setting(
        "DYN_GRACEFUL_SHUTDOWN_S", 30.0, "At shutdown, longest wait for requests under way.", unit="s"
    )
    log: str = setting("DYN_LOG", "info", "Log level: error, warn, info or debug; `off` for none.")


class FrontendSettings(SettingsGroup):
    """The OpenAI-compatible HTTP server."""

    http_host: str = setting("DYN_HTTP_HOST", "0.0.0.0", "Address to listen on.")  # noqa: S104
    http_port: Port = setting("DYN_HTTP_PORT", 8000, "Port to listen on; 0 takes a free one.")
    router_mode: Literal["round_robin", "random", "p2c", "least_loaded"] = setting(
        "DYN_ROUTER_MODE", "round_robin", "How a worker is chosen: round_robin, random, p2c, least_loaded."
    )
    max_body_bytes: Size = setting(
        "DYN_HTTP_BODY_LIMIT", ByteSize(45 << 20), "Largest HTTP request body.", unit="bytes"
    )
    request_timeout_s: Duration = setting(
        "DYN_HTTP_REQUEST_TIMEOUT_S", 600.0, "Longest time one request may take; 0 means no limit.", unit="s"
    )


GROUPS: tuple[type[SettingsGroup], ...] = (StoreSettings, PlaneSettings, RuntimeSettings, FrontendSettings)
"""All groups, in the order in which `docs/settings.md` and `dynamo-redis settings` list them."""


# --------------------------------------------------------------------------- the runtime file of `up`


def runtime_file() -> Path:
    """Where `dynamo-redis up` leaves its address for this user's other commands."""
    return platformdirs.user_runtime_path("dynamo-redis") / "up.json"


def read_runtime_file() -> dict[str, str]:
    """The running `up`'s addresses; empty if none runs (a stale file of a dead process counts as none)."""
    try:
        content = json.loads(runtime_file().read_text())
        os.kill(int(content["pid"]), 0)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: value for name, value in content.items() if isinstance(value, str)}


def write_runtime_file(**addresses: str) -> None:
    """Say where this process's servers are, readable by this user only."""
    path = runtime_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.touch(mode=0o600)
    draft.write_text(json.dumps({"pid": os.getpid(), **addresses}))
    draft.replace(path)


def remove_runtime_file() -> None:
    """Forget this process's addresses, unless a later `up` has written its own."""
    try:
        mine = json.loads(runtime_file().read_text()).get("pid") == os.getpid()
    except (OSError, ValueError, AttributeError):
        return
    if mine:
        runtime_file().unlink(missing_ok=True)
