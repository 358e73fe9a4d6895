"""Settings of the request plane."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr

from dynamo_redis.config.base import Duration, PemFile, Port, SettingsGroup, Size, setting
from dynamo_redis.errors import ConfigError

_LARGEST_MESSAGE_BYTES = 2**32 - 1

_HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?"
)


_NATS_URL = "nats://localhost:4222"
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._-]+)+")

PLANES = ("tcp", "http", "nats", "redis")
"""The request planes, by the names that `DYN_REQUEST_PLANE` gives them."""


def _parse_request_plane(value: object) -> object:
    names = [name.strip().lower() for name in value.split(",")] if isinstance(value, str) else []
    if names and all(name in PLANES for name in names):
        return ",".join(dict.fromkeys(names))
    raise invalid_plane(value)


def invalid_plane(value: object) -> ValueError:
    """Make the error for a value that names no request plane."""
    return ValueError(f"Invalid request plane mode: {value!r}. Valid options are: {', '.join(PLANES)}")


def _check_message_size(value: ByteSize) -> ByteSize:
    if value > _LARGEST_MESSAGE_BYTES:
        raise ValueError("must be at most 4 GiB - 1 byte: a frame cannot be larger")
    return value


def _check_host(value: str) -> str:
    """Return the host name or address. An IPv6 address may be in brackets, as it is before a port."""
    host = value.strip()
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    scope, _, zone = host.partition("%")
    if zone and _is_address(scope):
        return host
    if not _HOST_NAME.fullmatch(host):
        raise ValueError(
            "must be a host name or an address alone, without a scheme and without a port: the port has its "
            "own setting"
        )
    return host


def _check_dialled_host(value: str) -> str:
    host = _check_host(value)
    if _is_address(host) and ipaddress.ip_address(host).is_unspecified:
        raise ValueError(
            "is an address to listen on, which callers cannot dial: write the address of one interface"
        )
    return host


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_root_path(value: str) -> str:
    path = "/" + value.strip("/")
    if path == "/" or not _ROOT_PATH.fullmatch(path):
        raise ValueError("must be a path of letters, digits, '.', '_' and '-', such as /v1/rpc")
    return path


ListenedHost = Annotated[str, AfterValidator(_check_host)]
DialledHost = Annotated[str, AfterValidator(_check_dialled_host)]
RequestPlane = Annotated[str, BeforeValidator(_parse_request_plane)]


class PlaneSettings(SettingsGroup):
    """The request plane: how requests reach workers."""

    request_plane: RequestPlane = setting(
        "DYN_REQUEST_PLANE",
        "tcp",
        "How requests reach workers. tcp: directly; http: directly, by HTTP/2; nats: through a NATS server; "
        "redis: through the deployment's Redis.",
    )
    tcp_host: ListenedHost | None = setting(
        "DYN_TCP_RPC_HOST",
        None,
        "Address to listen on. Unset: all interfaces, or loopback if Redis is local.",
    )
    tcp_port: Port = setting("DYN_TCP_RPC_PORT", 0, "Port to listen on; 0 takes a free one.")
    tcp_advertise_host: DialledHost | None = setting(
        "DYN_TCP_ADVERTISE_HOST",
        None,
        "Host name or address that callers dial, behind NAT or in a container.",
    )
    tcp_advertise_port: Annotated[Port, Field(ge=1)] | None = setting(
        "DYN_TCP_ADVERTISE_PORT", None, "Port that callers dial. Unset: the port that is listened on."
    )
    tcp_advertise_check: Literal["warn", "require", "off"] = setting(
        "DYN_TCP_ADVERTISE_CHECK",
        "warn",
        "Before it registers, a worker dials the address that it advertises once. If that fails: warn logs "
        "it and goes on, since some networks reach that address only from other machines; require ends the "
        "worker. off: no check.",
    )
    max_message_bytes: Annotated[Size, AfterValidator(_check_message_size)] = setting(
        "DYN_TCP_MAX_MESSAGE_SIZE",
        ByteSize(32 << 20),
        "Largest request or response item; below 4 GiB.",
        unit="bytes",
    )
    accept_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_TCP_REQUEST_TIMEOUT",
        10.0,
        "Longest wait until a worker accepts a request that was sent.",
        unit="s",
    )
    pool_size: Annotated[int, Field(ge=1, le=1000)] = setting(
        "DYN_TCP_POOL_SIZE", 50, "Most connections to one instance; requests share them."
    )
    connect_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_TCP_CONNECT_TIMEOUT", 3.0, "Longest wait for a connection, with its handshake.", unit="s"
    )
    channel_buffer_count: Annotated[int, Field(ge=1)] = setting(
        "DYN_TCP_CHANNEL_BUFFER",
        100,
        "Most items of a response stream that wait for their reader.",
        unit="items",
    )
    keepalive_interval_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_TCP_KEEPALIVE_S",
        1.0,
        "A connection with requests under way is probed after a quarter of this time without traffic. After "
        "three quarters, other instances are preferred. A host that acknowledges nothing counts as dead "
        "after twice this time; a process that gives no sign of life, after five times this time, at least "
        "5 s.",
        unit="s",
    )
    max_in_flight_count: Annotated[int, Field(ge=1)] = setting(
        "DYN_TCP_MAX_IN_FLIGHT",
        4096,
        "Most requests that a worker handles at once. Each endpoint has 16 more places, which other "
        "endpoints cannot take.",
        unit="requests",
    )
    max_queued_count: Annotated[int, Field(ge=0)] = setting(
        "DYN_TCP_MAX_QUEUED",
        4096,
        "Most requests that wait at a worker; beyond that it answers Overloaded.",
        unit="requests",
    )
    cancel_grace_s: Duration = setting(
        "DYN_CANCEL_GRACE_S",
        5.0,
        "A handler whose caller has left, or whose deadline has passed, is closed at its next yield. After "
        "this time it is cancelled. 0: it is cancelled at once.",
        unit="s",
    )
    max_payload_in_flight_bytes: Size = setting(
        "DYN_TCP_MAX_PAYLOAD_BYTES_IN_FLIGHT",
        ByteSize(1 << 30),
        "Most bytes of messages over 64 KiB that a process holds as a worker, and the same again as a "
        "caller: those that arrive, are unread, or belong to requests under way. A message beyond that ends "
        "as Overloaded.",
        unit="bytes",
    )
    max_connections_count: Annotated[int, Field(ge=1)] = setting(
        "DYN_TCP_MAX_CONNECTIONS", 16384, "Most connections a worker accepts.", unit="connections"
    )
    auth: Literal["secret", "off"] = setting(
        "DYN_PLANE_AUTH",
        "secret",
        "secret: callers must prove that they can read the registry; off: every caller may call. The "
        "worker's value counts: a caller proves what the worker's record asks for, whatever its own value.",
    )
    tcp_tls: Literal["off", "on", "mutual"] = setting(
        "DYN_TCP_TLS",
        "off",
        "off: requests travel unencrypted; on: over TLS, and callers check the workers' certificates; "
        "mutual: workers check the callers' certificates, too.",
    )
    tcp_tls_ca: PemFile | None = setting(
        "DYN_TCP_TLS_CA", None, "PEM file with the certificate authorities that sign the peers' certificates."
    )
    tcp_tls_cert: PemFile | None = setting(
        "DYN_TCP_TLS_CERT",
        None,
        "PEM file with this process's certificate and the intermediate certificates. Workers need one; "
        "callers need one if TLS is mutual.",
    )
    tcp_tls_key: PemFile | None = setting(
        "DYN_TCP_TLS_KEY", None, "PEM file with the certificate's private key, unencrypted."
    )
    tcp_tls_server_name: str | None = setting(
        "DYN_TCP_TLS_SERVER_NAME",
        None,
        "Host name that every worker's certificate has. Unset: the host that is dialled.",
    )
    http_rpc_host: ListenedHost | None = setting(
        "DYN_HTTP_RPC_HOST",
        None,
        "Address that the http plane listens on. Unset: as DYN_TCP_RPC_HOST.",
    )
    http_rpc_port: Port | None = setting(
        "DYN_HTTP_RPC_PORT",
        None,
        "Port that the http plane listens on; 0 takes a free one. Unset: 8888, or a free one if that is "
        "in use.",
    )
    http_advertise_host: DialledHost | None = setting(
        "DYN_HTTP_ADVERTISE_HOST", None, "As DYN_TCP_ADVERTISE_HOST, for the http plane."
    )
    http_advertise_port: Annotated[Port, Field(ge=1)] | None = setting(
        "DYN_HTTP_ADVERTISE_PORT", None, "As DYN_TCP_ADVERTISE_PORT, for the http plane."
    )
    http_root_path: Annotated[str, AfterValidator(_check_root_path)] = setting(
        "DYN_HTTP_RPC_ROOT_PATH",
        "/v1/rpc",
        "Path of the http plane: requests go to PATH/NAMESPACE/COMPONENT/ENDPOINT.",
    )
    http2_max_frame_bytes: Annotated[Size, Field(ge=16_384, le=16_777_215)] = setting(
        "DYN_HTTP2_MAX_FRAME_SIZE", ByteSize(1 << 20), "Largest HTTP/2 frame that is received.", unit="bytes"
    )
    http2_max_concurrent_streams: Annotated[int, Field(ge=1)] = setting(
        "DYN_HTTP2_MAX_CONCURRENT_STREAMS",
        1000,
        "Most requests at once on one HTTP/2 connection; a caller opens further connections.",
        unit="requests",
    )
    http2_pool_max_idle_count: Annotated[int, Field(ge=0)] = setting(
        "DYN_HTTP2_POOL_MAX_IDLE_PER_HOST",
        100,
        "Most HTTP/2 connections without requests that a caller keeps to one instance.",
        unit="connections",
    )
    http2_pool_idle_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_HTTP2_POOL_IDLE_TIMEOUT_SECS",
        90.0,
        "An HTTP/2 connection without requests is closed after this time.",
        unit="s",
    )
    http2_keep_alive_interval_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_HTTP2_KEEP_ALIVE_INTERVAL_SECS",
        30.0,
        "An HTTP/2 connection with requests gets a PING after this time without traffic.",
        unit="s",
    )
    http2_keep_alive_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_HTTP2_KEEP_ALIVE_TIMEOUT_SECS",
        10.0,
        "A worker that does not answer this PING within this time is given up.",
        unit="s",
    )
    http2_adaptive_window: bool = setting(
        "DYN_HTTP2_ADAPTIVE_WINDOW",
        True,
        "true: windows of HTTP/2 for fast networks (1 MiB a request, 16 MiB a connection); false: those of "
        "the standard (64 KiB).",
    )
    nats_server: SecretStr | None = setting(
        "NATS_SERVER",
        None,
        "URL of the NATS server of the nats plane; tls://… for TLS. Unset: nats://localhost:4222.",
    )
    nats_username: str | None = setting("NATS_AUTH_USERNAME", None, "User name at the NATS server.")
    nats_password: SecretStr | None = setting("NATS_AUTH_PASSWORD", None, "Password at the NATS server.")
    nats_token: SecretStr | None = setting("NATS_AUTH_TOKEN", None, "Token that the NATS server asks for.")
    nats_nkey: SecretStr | None = setting("NATS_AUTH_NKEY", None, "Seed of the NKey at the NATS server.")
    nats_credentials_file: Path | None = setting(
        "NATS_AUTH_CREDENTIALS_FILE", None, "Credentials file (JWT and NKey) for the NATS server."
    )
    nats_tls_ca: PemFile | None = setting(
        "NATS_TLS_CA", None, "PEM file with the authorities that sign the NATS server's certificate."
    )
    nats_tls_cert: PemFile | None = setting(
        "NATS_TLS_CERT", None, "PEM file with this process's certificate for the NATS server."
    )
    nats_tls_key: PemFile | None = setting("NATS_TLS_KEY", None, "PEM file with that certificate's key.")

    @property
    def planes(self) -> tuple[str, ...]:
        """The planes of `DYN_REQUEST_PLANE`: one, or for servers several, the preferred one first."""
        return tuple(self.request_plane.split(","))

    def require_one_plane(self) -> str:
        """Return the plane of a client. Raises ConfigError if several are named."""
        if len(self.planes) > 1:
            raise ConfigError(
                f"{invalid_plane(self.request_plane)} (several are for workers only: a client names one)"
            )
        return self.planes[0]

    @property
    def nats_url(self) -> str:
        """The URL of the NATS server, with the password if it has one."""
        return _NATS_URL if self.nats_server is None else self.nats_server.get_secret_value()
