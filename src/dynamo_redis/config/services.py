"""Settings of the runtime, the frontend, and the test fixtures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ByteSize, Field, SecretStr

from dynamo_redis.config.base import Duration, PemFile, Port, SettingsGroup, Size, setting

MAX_CLOSING_S = 2.0


def _check_redis_source(value: str) -> str:
    if not re.fullmatch(r"auto|container|path|wheel|(redis|rediss|unix)://.+", value):
        raise ValueError("must be auto, container, path, wheel, or a URL: redis://, rediss:// or unix://")
    return value


def _check_overload_status(value: int) -> int:
    if value not in (429, 503, 529):
        raise ValueError("must be 503, 529 or 429")
    return value


def _check_paths(value: str) -> str:
    if value != "-" and not all(re.fullmatch(r"/[^\s,?#]*", path) for path in value.split(",")):
        raise ValueError("must be paths, each with a / at its beginning, with commas between them, or -")
    return value


def _check_origins(value: str) -> str:
    if value != "*" and not all(re.fullmatch(r"https?://[^\s/,*@]+", each) for each in value.split(",")):
        raise ValueError("must be *, or origins such as https://chat.example, with commas between them")
    return value


class RuntimeSettings(SettingsGroup):
    """Start, shutdown and log of a process."""

    namespace: str = setting("DYN_NAMESPACE", "dynamo", "Namespace of the endpoints.")
    drain_s: Duration = setting(
        "DYN_GRACEFUL_SHUTDOWN_S",
        30.0,
        "Longest time of a whole shutdown. Its last quarter, at most 2 s, is for leaving the registry; "
        "requests under way have the time before that.",
        unit="s",
    )
    wait_for_redis: bool = setting(
        "DYN_WAIT_FOR_REDIS",
        False,
        "A service that cannot reach Redis at its start waits until it can, without a limit, instead of "
        "ending at once.",
    )
    log: str = setting("DYN_LOG", "info", "Log level: error, warn, info or debug; `off` for none.")
    log_format: Literal["text", "json"] = setting(
        "DYN_LOG_FORMAT", "text", "Form of log lines: text for people, json for collectors: an object a line."
    )
    logging_jsonl: bool = setting("DYN_LOGGING_JSONL", False, "Dynamo's name for `DYN_LOG_FORMAT=json`.")

    @property
    def logs_json(self) -> bool:
        """True if log lines are JSON."""
        return self.logging_jsonl or self.log_format == "json"

    @property
    def closing_s(self) -> float:
        """The part of `drain_s` that is reserved for leaving the registry, after the requests."""
        return min(MAX_CLOSING_S, self.drain_s / 4)


class FrontendSettings(SettingsGroup):
    """The OpenAI-compatible HTTP server."""

    http_host: str = setting("DYN_HTTP_HOST", "0.0.0.0", "Address to listen on.")  # noqa: S104
    http_port: Port = setting("DYN_HTTP_PORT", 8000, "Port to listen on; 0 takes a free one.")
    frontend_processes_count: Annotated[int, Field(ge=1, le=64)] = setting(
        "DYN_FRONTEND_PROCESSES",
        1,
        "Frontend processes on that port. One uses one core. Limits of connections, bodies and requests are "
        "those of each process.",
    )
    kserve_grpc_server: bool = setting(
        "DYN_KSERVE_GRPC_SERVER",
        False,
        "Serve the KServe v2 inference protocol over gRPC, beside HTTP. It needs `dynamo-redis[kserve]`.",
    )
    grpc_port: Port = setting(
        "DYN_GRPC_PORT", 8787, "Port of the KServe server, at the address of HTTP; 0 takes a free one."
    )
    router_mode: Literal["round_robin", "random", "p2c", "least_loaded", "kv"] = setting(
        "DYN_ROUTER_MODE",
        "round_robin",
        "How a worker is chosen: round_robin, random, p2c, least_loaded, or kv (by the contents of the KV "
        "caches).",
    )
    router_endpoint: str | None = setting(
        "DYN_ROUTER_ENDPOINT",
        None,
        "With kv: the router service at this endpoint (`dynamo.router.generate`) chooses the workers. Unset: "
        "the frontend chooses.",
    )
    max_body_bytes: Size = setting(
        "DYN_HTTP_BODY_LIMIT", ByteSize(45 << 20), "Largest HTTP request body.", unit="bytes"
    )
    max_bodies_bytes: Size = setting(
        "DYN_HTTP_BODIES_LIMIT",
        ByteSize(180 << 20),
        "Most bytes of all HTTP request bodies held at a time: until they are token ids, and of chats with "
        "images until they are answered. Answers with embeddings count, too, until they are sent. The first "
        "32 KiB of each do not count.",
        unit="bytes",
    )
    max_choices_count: Annotated[int, Field(ge=1)] = setting(
        "DYN_HTTP_MAX_CHOICES", 256, "Most answers that one HTTP request may ask for: its prompts times `n`."
    )
    max_http_connections_count: Annotated[int, Field(ge=1)] = setting(
        "DYN_HTTP_MAX_CONNECTIONS",
        8192,
        "Most HTTP connections; fewer if the limit of open files allows fewer. Beyond that, a new connection "
        "replaces the one that has been without a request for the longest time.",
    )
    max_http_in_flight_count: Annotated[int, Field(ge=1)] | None = setting(
        "DYN_HTTP_MAX_IN_FLIGHT",
        None,
        "Most requests to models under way at a frontend process: completions, embeddings, and counts of "
        "tokens. Further ones wait in line. Unset: as many as there are connections.",
        unit="requests",
    )
    max_http_queued_count: Annotated[int, Field(ge=0)] = setting(
        "DYN_HTTP_MAX_QUEUED",
        1024,
        "Most requests in that line; beyond that the answer is 503.",
        unit="requests",
    )
    http_queue_wait_s: Duration = setting(
        "DYN_HTTP_QUEUE_WAIT_S",
        1.0,
        "Longest time that a request waits in that line; then the answer is 503. 0: at once.",
        unit="s",
    )
    overload_status: Annotated[int, AfterValidator(_check_overload_status)] = setting(
        "DYN_HTTP_OVERLOAD_STATUS_CODE",
        503,
        "HTTP status of a request that is refused because of overload: 503; 529 as by Dynamo; or 429.",
    )
    receive_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_HTTP_RECEIVE_TIMEOUT_S",
        60.0,
        "Longest time from the first byte of an HTTP request to its last.",
        unit="s",
    )
    send_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_HTTP_SEND_TIMEOUT_S",
        60.0,
        "Longest time that an HTTP client may read nothing of its response.",
        unit="s",
    )
    request_timeout_s: Duration = setting(
        "DYN_HTTP_REQUEST_TIMEOUT_S", 600.0, "Longest time of one request; 0: no limit.", unit="s"
    )
    migration_limit: Annotated[int, Field(ge=0)] | None = setting(
        "DYN_MIGRATION_LIMIT",
        None,
        "How often an answer whose worker is lost goes on at another one; 0: it ends with an error. Unset: "
        "as the model's workers say (`--model-migration-limit`).",
    )
    migration_max_seq_len: Annotated[int, Field(ge=1)] | None = setting(
        "DYN_MIGRATION_MAX_SEQ_LEN",
        None,
        "Answers go on only up to this many tokens, with their prompt. Unset: without a limit.",
        unit="tokens",
    )
    http_api_key: SecretStr | None = setting(
        "DYN_HTTP_API_KEY",
        None,
        "Key that HTTP clients must send, as `Authorization: Bearer KEY` or `x-api-key: KEY`; several with "
        "commas between them. Unset, and without a file of keys: none is asked for.",
    )
    http_api_key_file: Path | None = setting(
        "DYN_HTTP_API_KEY_FILE",
        None,
        "File with such keys, one a line; `#` begins a comment. Changes count within a second.",
    )
    http_open_paths: Annotated[str, AfterValidator(_check_paths)] = setting(
        "DYN_HTTP_OPEN_PATHS",
        "/health,/live,/metrics",
        "Paths that need no key, with commas between them; `-`: none.",
    )
    http_cors_origins: Annotated[str, AfterValidator(_check_origins)] | None = setting(
        "DYN_HTTP_CORS_ORIGINS",
        None,
        "Origins of web pages that may use the HTTP API (`https://chat.example`), with commas between them; "
        "`*`: any page. Unset: none.",
    )
    tls_cert_path: PemFile | None = setting(
        "DYN_TLS_CERT_PATH",
        None,
        "PEM file with the certificate of the HTTP port, and the intermediate certificates. Unset: HTTP in "
        "the clear. A changed file counts for connections made after it.",
    )
    tls_key_path: PemFile | None = setting(
        "DYN_TLS_KEY_PATH", None, "PEM file with the certificate's private key, unencrypted."
    )
    access_log: bool = setting(
        "DYN_HTTP_ACCESS_LOG",
        False,
        "Log a line for each HTTP request: method, path, status, model, tokens, times and request id.",
    )
    dashboard: bool = setting(
        "DYN_DASHBOARD", True, "Serve `/dashboard`, a live status page for browsers, on the HTTP port."
    )
    tokenizer: Literal["fastokens", "default"] = setting(
        "DYN_TOKENIZER",
        "fastokens",
        "How prompts are tokenized: by fastokens (ten times as fast; some 150 MB more for a model of 150,000 "
        "tokens) where it is installed and found to give the same tokens, or default, always by tokenizers.",
    )
    model_cache: Path | None = setting(
        "DYN_MODEL_CACHE",
        None,
        "Directory that keeps model files fetched from Redis. Unset: one in the user's cache directory.",
    )


class FixtureSettings(SettingsGroup):
    """The Redis of the pytest fixtures of `dynamo_redis.testing`."""

    dynamo_redis: Annotated[str, AfterValidator(_check_redis_source)] = setting(
        "DYN_TEST_REDIS",
        "auto",
        "container: a container engine; path: redis-server or valkey-server on PATH; wheel: the server of "
        "dynamo-redis[embedded]; auto: the first of these that is available; a URL: that server.",
    )
    dynamo_skip_without_redis: bool = setting(
        "DYN_TEST_SKIP_WITHOUT_REDIS",
        False,
        "With auto: if no Redis is available, skip the tests that need one instead of failing them.",
    )
