"""The address that a server listens on, and the address that it advertises to callers.

Listen: the configured host; else loopback if Redis is on this machine; else all interfaces of the address
family that reaches Redis. Advertise: the configured host and port; else the host that the server listens on,
unless that is a wildcard; else the local address from which this machine reaches Redis.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from dataclasses import dataclass

from dynamo_redis.errors import ConfigError

_LOOPBACK = "127.0.0.1"
_ANY_V4, _ANY_V6 = "0.0.0.0", "::"  # noqa: S104 - documented default, and the wildcards to recognize


@dataclass(frozen=True, slots=True)
class Binding:
    """The host to listen on, and the host to advertise."""

    listen_host: str
    advertise_host: str


def format_address(host: str, port: int) -> str:
    """Format an address: `("10.0.0.7", 80)` → `10.0.0.7:80`, `("::1", 80)` → `[::1]:80`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(address: str) -> tuple[str, int]:
    """Parse an address that `format_address` made. Raises ValueError."""
    host, separator, port = address.rpartition(":")
    if not separator or not host:
        raise ValueError(f"{address!r} is not host:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{address!r}: write an IPv6 address in brackets, as [::1]:80")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 1 << 16):
        raise ValueError(f"{address!r}: the port is not one of 0 to 65535")
    return host, int(port)


async def choose_binding(host: str | None, advertise_host: str | None, redis_host: str | None) -> Binding:
    """Choose both hosts by the rules above. `redis_host` is None if Redis is reached over a unix socket.

    Raises ConfigError if the route to Redis is needed and cannot be found.
    """
    if host is not None:
        try:
            is_wildcard = ipaddress.ip_address(host).is_unspecified
        except ValueError:
            is_wildcard = not host
        if not is_wildcard:
            return Binding(host, advertise_host or host)
    local = await _local_address(redis_host) if host is None or advertise_host is None else _LOOPBACK
    if host is None:
        if ipaddress.ip_address(local.partition("%")[0]).is_loopback:
            return Binding(local, advertise_host or local)
        host = _ANY_V6 if ":" in local else _ANY_V4
    return Binding(host, advertise_host or local)


async def _local_address(redis_host: str | None) -> str:
    """Return the address from which this machine reaches Redis."""
    if redis_host is None:
        return _LOOPBACK
    try:
        found = await asyncio.get_running_loop().getaddrinfo(redis_host, 1, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # chooses a route; a datagram socket sends nothing
            return str(probe.getsockname()[0])
    except OSError as exc:
        raise ConfigError(
            f"cannot tell which of this machine's addresses others should dial (no route to {redis_host}: "
            f"{exc.strerror or exc}): set DYN_TCP_ADVERTISE_HOST"
        ) from exc
