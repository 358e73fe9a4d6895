"""The address that a server listens on, and the one that it advertises."""

from __future__ import annotations

import pytest

from dynamo_redis.errors import ConfigError
from dynamo_redis.planes.address import Binding, choose_binding, format_address, parse_address
from dynamo_redis.planes.select import first_host


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("10.0.0.7", 80, "10.0.0.7:80"),
        ("::1", 80, "[::1]:80"),
        ("worker-0.local", 65535, "worker-0.local:65535"),
    ],
)
def test_address_is_written_and_read(host: str, port: int, address: str) -> None:
    assert format_address(host, port) == address
    assert parse_address(address) == (host, port)


@pytest.mark.parametrize("text", ["", "host", ":80", "::1:80", "[::1]", "host:port", "[::1]:"])
def test_malformed_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_address(text)


LOCAL, ANY = "127.0.0.1", "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "advertise", "redis", "binding"),
    [
        (None, None, None, Binding(LOCAL, LOCAL)),
        (None, None, "127.0.0.1", Binding(LOCAL, LOCAL)),
        (None, None, "localhost", Binding(LOCAL, LOCAL)),
        (None, "public.example", "127.0.0.1", Binding(LOCAL, "public.example")),
        ("10.1.2.3", None, "203.0.113.1", Binding("10.1.2.3", "10.1.2.3")),
        ("10.1.2.3", "nat.example", None, Binding("10.1.2.3", "nat.example")),
        (ANY, "nat.example", "no.such.host.invalid", Binding(ANY, "nat.example")),
        (ANY, None, None, Binding(ANY, LOCAL)),
        ("::", "nat.example", None, Binding("::", "nat.example")),
    ],
)
async def test_rules(host: str | None, advertise: str | None, redis: str | None, binding: Binding) -> None:
    found = await choose_binding(host, advertise, redis)
    if redis == "localhost" and found.listen_host == "::1":
        binding = Binding("::1", "::1")
    assert found == binding


async def test_no_route_to_redis_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="DYN_TCP_ADVERTISE_HOST"):
        await choose_binding(None, None, "no.such.host.invalid")


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("redis://u:p@h:1", "h"),
        ("unix:///path", None),
        ("redis+cluster://10.0.0.1,10.0.0.2", "10.0.0.1"),
        ("rediss+cluster://u:p%2C@n1:1,n2:2?ssl_cert_reqs=none", "n1"),
        ("redis+cluster://[fd00::1],[fd00::2]:7", "fd00::1"),
        ("redis+sentinel://s1,s2/mymaster", "s1"),
    ],
)
def test_first_host_of_a_redis_url(url: str, host: str | None) -> None:
    assert first_host(url) == host
