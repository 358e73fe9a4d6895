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
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Self

import platformdirs
from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, DotEnvSettingsSource, EnvSettingsSource, SettingsConfigDict

from dynamo_redis.errors import ConfigError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}

_LARGEST_MESSAGE_BYTES = 2**32 - 1

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


def _check_prefix(value: str) -> str:
    if not re.fullmatch(r"[^{}\s]{1,64}", value):
        raise ValueError("must be 1 to 64 characters, without braces and spaces")
    return value


def _check_directory(value: object) -> object:
    if isinstance(value, str) and not value.strip():  # a Path of it would be the working directory
        raise ValueError("must name a directory; leave it out for the demo model")
    return value


def _check_redis_source(value: str) -> str:
    if not re.fullmatch(r"auto|container|path|wheel|(redis|rediss|unix)://.+", value):
        raise ValueError("must be auto, container, path, wheel, or a URL: redis://, rediss:// or unix://")
    return value


def _check_message_size(value: ByteSize) -> ByteSize:
    if value > _LARGEST_MESSAGE_BYTES:
        raise ValueError("must be at most 4 GiB - 1 byte, which is what the wire carries")
    return value


Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0)]
Size = ByteSize
RequestPlane = Annotated[Literal["tcp", "http", "nats", "redis"], BeforeValidator(_parse_request_plane)]
Port = Annotated[int, Field(ge=0, le=65535)]
PemFile = NewType("PemFile", Path)


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
        except (UnicodeDecodeError, OSError) as exc:
            raise _unreadable_dotenv(exc) from exc

    @classmethod
    def _explain(cls, exc: ValidationError) -> str:
        error = exc.errors(include_url=False)[0]
        name = str(error["loc"][0]) if error["loc"] else cls.__name__
        env = next((env_name(f) for n, f in cls.model_fields.items() if name in (n, env_name(f))), name)
        secret = any(
            env_name(field) == env and field.annotation is not str and "Secret" in str(field.annotation)
            for field in cls.model_fields.values()
        )
        unit = next((unit_of(f) for f in cls.model_fields.values() if env_name(f) == env), "")
        reason = _bound(error, unit) or error["msg"].removeprefix("Value error, ")
        shown = "" if secret or repr(error["input"]) in reason else f"={error['input']!r}"
        return f"{env}{shown}: {reason}"


def _bound(error: ErrorDetails, unit: str) -> str:
    """What a number must be, with its unit, if that is what is wrong with it; else an empty string."""
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for name, limit in error.get("ctx", {}).items():
        if name in words:
            return f"must be {words[name]} {limit:g} {unit}".rstrip()
    return ""


def _unreadable_dotenv(exc: Exception) -> ConfigError:
    """The `.env` file in the working directory is the only file that settings are read from."""
    reason = exc.strerror if isinstance(exc, OSError) else f"it is not UTF-8 text: {exc}"
    return ConfigError(f"{Path.cwd() / '.env'} cannot be read: {reason}")


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
    prefix: Annotated[str, AfterValidator(_check_prefix)] = setting(
        "DYN_REDIS_PREFIX", "dynamo", "First part of every key: one registry a prefix."
    )
    lease_ttl_s: Annotated[Duration, Field(ge=1, le=3600)] = setting(
        "DYN_LEASE_TTL_S", 10.0, "A process silent for so long is removed from the registry.", unit="s"
    )
    loop_stall_s: Duration = setting(
        "DYN_LOOP_STALL_S",
        120.0,
        "A process whose event loop hangs for so long gives up its lease; 0: never.",
        unit="s",
    )
    command_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_REDIS_TIMEOUT_S", 3.0, "Longest wait for one answer from Redis.", unit="s"
    )

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the group; where no server is set, that of a running `dynamo-redis up`, with its prefix."""
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
        """The server's URL. Raises ConfigError if there is none."""
        if self.redis_url is None:
            raise ConfigError(
                "no Redis is configured: set DYN_REDIS_URL (or --redis-url) to redis://host:6379, "
                "or run `dynamo-redis up`, which starts one"
            )
        return self.redis_url.get_secret_value()


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
    max_message_bytes: Annotated[Size, AfterValidator(_check_message_size)] = setting(
        "DYN_TCP_MAX_MESSAGE_SIZE",
        ByteSize(32 << 20),
        "Largest request or response item; below 4 GiB.",
        unit="bytes",
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
        "A connection with requests under way is probed after a quarter of this in silence; after three "
        "quarters other instances are preferred, and after twice this it is dead.",
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
    max_payload_in_flight_bytes: Size = setting(
        "DYN_TCP_MAX_PAYLOAD_BYTES_IN_FLIGHT",
        ByteSize(1 << 30),
        "Most bytes of messages over 64 KiB that a process holds as a worker, and as many as a caller: "
        "coming in, unread, or of requests under way; what does not fit ends as Overloaded.",
        unit="bytes",
    )
    max_connections_count: Annotated[int, Field(ge=1)] = setting(
        "DYN_TCP_MAX_CONNECTIONS", 16384, "Most connections a worker accepts.", unit="connections"
    )
    auth: Literal["secret", "off"] = setting(
        "DYN_PLANE_AUTH",
        "secret",
        "secret: callers prove that they may read the registry; off: anyone may call. It is the worker's: "
        "callers prove what its record asks for, whatever they are set to themselves.",
    )
    tcp_tls: Literal["off", "on", "mutual"] = setting(
        "DYN_TCP_TLS",
        "off",
        "off: requests travel in the clear; on: over TLS, and callers check workers' certificates; mutual: "
        "workers check callers', too.",
    )
    tcp_tls_ca: PemFile | None = setting(
        "DYN_TCP_TLS_CA", None, "PEM file with the authorities that sign the other side's certificate."
    )
    tcp_tls_cert: PemFile | None = setting(
        "DYN_TCP_TLS_CERT",
        None,
        "PEM file with this process's certificate, and those between it and the authority. Workers have one; "
        "callers, too, where TLS is mutual.",
    )
    tcp_tls_key: PemFile | None = setting(
        "DYN_TCP_TLS_KEY", None, "PEM file with the certificate's private key, not encrypted."
    )
    tcp_tls_server_name: str | None = setting(
        "DYN_TCP_TLS_SERVER_NAME",
        None,
        "The name that every worker's certificate has. Unset: the host that is dialled.",
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
    model_cache: Path | None = setting(
        "DYN_MODEL_CACHE",
        None,
        "Directory that keeps model files fetched from Redis. Unset: one in the user's cache directory.",
    )


class ModelSettings(SettingsGroup):
    """Which model a worker serves."""

    model_path: Annotated[Path, BeforeValidator(_check_directory)] | None = setting(
        "DYN_MODEL_PATH",
        None,
        "Directory with the model's tokenizer.json, tokenizer_config.json, config.json and "
        "generation_config.json. Unset: a small demo model.",
    )
    model_name: Annotated[str, Field(min_length=1, max_length=256)] | None = setting(
        "DYN_MODEL_NAME", None, "The model's name in requests. Unset: the directory's name."
    )
    context_length: Annotated[int, Field(ge=1)] | None = setting(
        "DYN_CONTEXT_LENGTH",
        None,
        "Most tokens of a prompt and its answer. Unset: what the model's files say.",
        unit="tokens",
    )


class MockEngineSettings(SettingsGroup):
    """The mock engine: how large it is, and how fast. The timing model stands in `engines/batching.py`."""

    speedup_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] = setting(
        "DYN_MOCK_SPEEDUP_RATIO", 1.0, "How many times faster than real; 0 does not wait at all."
    )
    block_size: Annotated[int, Field(ge=1, le=4096)] = setting(
        "DYN_MOCK_BLOCK_SIZE", 16, "Tokens in a block of the KV cache.", unit="tokens"
    )
    total_kv_blocks: Annotated[int, Field(ge=1)] = setting(
        "DYN_MOCK_TOTAL_KV_BLOCKS", 16384, "Blocks the KV cache holds.", unit="blocks"
    )
    max_num_seqs: Annotated[int, Field(ge=1)] = setting(
        "DYN_MOCK_MAX_NUM_SEQS", 256, "Most requests that run at once.", unit="requests"
    )
    max_num_waiting: Annotated[int, Field(ge=0)] = setting(
        "DYN_MOCK_MAX_NUM_WAITING",
        1024,
        "Most requests that wait for their turn; past that the engine answers Overloaded.",
        unit="requests",
    )
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = setting(
        "DYN_MOCK_MAX_NUM_BATCHED_TOKENS", 8192, "Most tokens computed in one step.", unit="tokens"
    )
    prefill_token_s: Duration = setting(
        "DYN_MOCK_PREFILL_TOKEN_S", 0.00005, "Time to read one token of a prompt.", unit="s"
    )
    decode_step_s: Duration = setting(
        "DYN_MOCK_DECODE_STEP_S", 0.008, "Time of one step, whatever its batch.", unit="s"
    )
    decode_sequence_s: Duration = setting(
        "DYN_MOCK_DECODE_SEQUENCE_S", 0.00003, "Further time of a step for each answer in it.", unit="s"
    )


class FixtureSettings(SettingsGroup):
    """Where the pytest fixtures of `dynamo_redis.testing` get their Redis."""

    redis: Annotated[str, AfterValidator(_check_redis_source)] = setting(
        "DYN_TEST_REDIS",
        "auto",
        "container: a container engine; path: redis-server or valkey-server on PATH; wheel: the one of "
        "dynamo-redis[embedded]; auto: the first of these that is there; a URL: that server.",
    )


GROUPS: tuple[type[SettingsGroup], ...] = (
    StoreSettings,
    PlaneSettings,
    RuntimeSettings,
    FrontendSettings,
    ModelSettings,
    MockEngineSettings,
    FixtureSettings,
)
"""All groups, in the order in which `docs/settings.md` and `dynamo-redis settings` list them."""


# --------------------------------------------------------------------------- where a value comes from

Origin = Literal["command line", "environment", ".env", "default"]


def origins(group: type[SettingsGroup], given: Collection[str] = ()) -> dict[str, Origin]:
    """Where each field of a group gets its value, by field name; `given` are those on the command line.

    Raises ConfigError if the `.env` file cannot be read.
    """
    try:
        environment, dotenv = EnvSettingsSource(group)(), DotEnvSettingsSource(group)()
    except (UnicodeDecodeError, OSError) as exc:
        raise _unreadable_dotenv(exc) from exc

    def origin(name: str, env: str) -> Origin:
        if name in given:
            return "command line"
        if env in environment:
            return "environment"
        return ".env" if env in dotenv else "default"

    return {name: origin(name, env_name(field)) for name, field in group.model_fields.items()}


def child_environment(values: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process: this process's, with these settings (by `DYN_…` name) over it.

    Settings go to children this way and not as arguments, which every user of the machine can read.
    """
    replaced = {name.upper() for name in values}
    return {name: value for name, value in os.environ.items() if name.upper() not in replaced} | dict(values)


def user_model_cache() -> Path:
    """Where this user's frontends keep model files, unless `DYN_MODEL_CACHE` says otherwise."""
    return platformdirs.user_cache_path("dynamo-redis") / "models"


# --------------------------------------------------------------------------- the runtime files of `up`


def runtime_directory() -> Path:
    """Where each `dynamo-redis up` leaves its addresses for this user's other commands."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that the system has no runtime directory: its fallback serves as well
        return platformdirs.user_runtime_path("dynamo-redis")


def read_runtime_file() -> dict[str, str]:
    """The addresses of the `up` that was started last and still runs; empty if none does."""
    live: list[tuple[float, dict[str, object]]] = []
    for path in runtime_directory().glob("up.*.json"):
        try:
            content, status = json.loads(path.read_text()), path.stat()
            os.kill(int(content["pid"]), 0)
            if _is_ours(status.st_uid):
                live.append((status.st_mtime, content))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a file of a dead process, or one that just went away
    if not live:
        return {}
    newest = max(live, key=lambda found: found[0])[1]
    return {name: value for name, value in newest.items() if isinstance(value, str)}


def write_runtime_file(**addresses: str) -> None:
    """Say where this process's servers are, readable by this user only. Dead processes' files are removed."""
    directory = runtime_directory()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    _remove_stale_files(directory)
    path = _own_runtime_file()
    draft = path.with_suffix(".draft")
    draft.touch(mode=0o600)
    draft.write_text(json.dumps({"pid": os.getpid(), **addresses}))
    draft.replace(path)


def remove_runtime_file() -> None:
    """Forget this process's addresses; those of another `up` stay."""
    _own_runtime_file().unlink(missing_ok=True)


def _is_ours(owner_id: int) -> bool:
    """Whether this user wrote the file: on a system without runtime directories it stands in `/tmp`."""
    return not hasattr(os, "getuid") or owner_id == os.getuid()


def _own_runtime_file() -> Path:
    return runtime_directory() / f"up.{os.getpid()}.json"


def _remove_stale_files(directory: Path) -> None:
    for path in directory.glob("up.*"):
        try:
            os.kill(int(path.name.split(".")[1]), 0)
        except (ProcessLookupError, ValueError, IndexError):
            path.unlink(missing_ok=True)
        except OSError:
            continue  # alive, but another user's
