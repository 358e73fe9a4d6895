"""Settings of the request plane."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field

from dynamo_redis.config.base import Duration, PemFile, Port, SettingsGroup, Size, setting

_LARGEST_MESSAGE_BYTES = 2**32 - 1

_HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?"
)

REQUEST_PLANES = ("tcp", "http", "nats", "redis")


def _parse_request_plane(value: object) -> object:
    if isinstance(value, str) and value.lower() in REQUEST_PLANES:
        return value.lower()
    raise ValueError(f"Invalid request plane mode: {value!r}. Valid options are: {', '.join(REQUEST_PLANES)}")


def _check_message_size(value: ByteSize) -> ByteSize:
    if value > _LARGEST_MESSAGE_BYTES:
        raise ValueError("must be at most 4 GiB - 1 byte, which is what the wire carries")
    return value


def _check_host(value: str) -> str:
    """A host alone; an IPv6 address may stand in brackets, as it does in front of a port."""
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
            "must be a host name or an address alone: without a scheme, and without a port, which has a "
            "setting of its own"
        )
    return host


def _check_dialled_host(value: str) -> str:
    host = _check_host(value)
    if _is_address(host) and ipaddress.ip_address(host).is_unspecified:
        raise ValueError("is an address to listen on: others cannot dial it; name one of this machine")
    return host


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


ListenedHost = Annotated[str, AfterValidator(_check_host)]
DialledHost = Annotated[str, AfterValidator(_check_dialled_host)]
RequestPlane = Annotated[Literal["tcp", "http", "nats", "redis"], BeforeValidator(_parse_request_plane)]


class PlaneSettings(SettingsGroup):
    """The request plane: how requests reach workers."""

    request_plane: RequestPlane = setting(
        "DYN_REQUEST_PLANE", "tcp", "How requests travel: tcp, http, nats or redis."
    )
    tcp_host: ListenedHost | None = setting(
        "DYN_TCP_RPC_HOST",
        None,
        "Address to listen on. Unset: all interfaces, or loopback if Redis is local.",
    )
    tcp_port: Port = setting("DYN_TCP_RPC_PORT", 0, "Port to listen on; 0 takes a free one.")
    tcp_advertise_host: DialledHost | None = setting(
        "DYN_TCP_ADVERTISE_HOST", None, "Host name or address that others dial, behind NAT or in a container."
    )
    tcp_advertise_port: Annotated[Port, Field(ge=1)] | None = setting(
        "DYN_TCP_ADVERTISE_PORT", None, "Port that others dial. Unset: the one listened on."
    )
    tcp_advertise_check: Literal["warn", "require", "off"] = setting(
        "DYN_TCP_ADVERTISE_CHECK",
        "warn",
        "A worker dials itself once at the address that it advertises, before it registers. If it cannot: "
        "warn says so and goes on, since some networks lead there only from other machines; require ends the "
        "worker; off leaves the check out.",
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
        "Longest wait until a worker accepts a request that has been sent.",
        unit="s",
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
        "quarters other instances are preferred; after twice this a host that acknowledges nothing is dead, "
        "after five times this, and 5 s at least, a process that gives no sign of life.",
        unit="s",
    )
    max_in_flight_count: Annotated[int, Field(ge=1)] = setting(
        "DYN_TCP_MAX_IN_FLIGHT",
        4096,
        "Most requests a worker handles at once; each endpoint has 16 more that others cannot take.",
        unit="requests",
    )
    max_queued_count: Annotated[int, Field(ge=0)] = setting(
        "DYN_TCP_MAX_QUEUED",
        4096,
        "Most requests a worker keeps waiting; past that it answers Overloaded.",
        unit="requests",
    )
    cancel_grace_s: Duration = setting(
        "DYN_CANCEL_GRACE_S",
        5.0,
        "A handler whose caller has left, or whose deadline has passed, is closed at its next yield, and "
        "cancelled after so long; 0: cancelled at once.",
        unit="s",
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
