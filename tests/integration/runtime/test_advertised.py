"""The checks of the advertised address: its form, and whether it leads to the process."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConfigError
from tests.integration.conftest import OpenRuntime


async def echo(request: Any) -> AsyncIterator[Any]:
    yield request


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Return a port that is bound and on which no socket listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("http://worker-0", "without a scheme"),
        ("127.0.0.1:9000", "without a port"),
        ("worker-0/x", "host name or an address alone"),
        ("a b", "host name or an address alone"),
        ("0.0.0.0", "an address to listen on"),
        ("[::]", "an address to listen on"),
    ],
)
def test_host_that_cannot_be_dialled_is_refused(host: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"DYN_TCP_ADVERTISE_HOST.*{reason}"):
        PlaneSettings.load(tcp_advertise_host=host)


@pytest.mark.parametrize(
    ("host", "taken"),
    [
        ("[::1]", "::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("10.0.0.7", "10.0.0.7"),
        ("worker_0.ns.svc.cluster.local", "worker_0.ns.svc.cluster.local"),
    ],
)
def test_hosts_are_accepted_in_all_forms(host: str, taken: str) -> None:
    assert PlaneSettings.load(tcp_advertise_host=host).tcp_advertise_host == taken


def test_port_0_cannot_be_advertised() -> None:
    with pytest.raises(ConfigError, match=r"DYN_TCP_ADVERTISE_PORT.*at least 1"):
        PlaneSettings.load(tcp_advertise_port=0)


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.name == "dynamo_redis.runtime.advertised"
    ]


async def test_reachable_address_is_not_warned_of(
    open_runtime: OpenRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    runtime = await open_runtime(tcp_advertise_check="require")
    await runtime.endpoint("a.b.c").start_serving(echo)
    assert complaints(caplog) == []
    client = await (await open_runtime()).endpoint("a.b.c").client()
    await client.wait_for_instances(10.0)
    assert [item async for item in await client.round_robin("x", annotated=False)] == ["x"]


async def test_unreachable_address_is_warned_of(
    open_runtime: OpenRuntime, closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = await open_runtime(tcp_advertise_host="127.0.0.1", tcp_advertise_port=closed_port)
    await runtime.endpoint("a.b.c").start_serving(echo)
    (complaint,) = complaints(caplog)
    assert f"does not reach itself at 127.0.0.1:{closed_port}" in complaint
    assert "set DYN_TCP_ADVERTISE_HOST" in complaint


async def test_address_of_another_process_is_warned_of(
    open_runtime: OpenRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    other = await open_runtime()
    served = await other.endpoint("a.b.c").start_serving(echo)
    port = int(served.instance.transport.address.partition("/")[0].rpartition(":")[2])
    runtime = await open_runtime(tcp_advertise_host="127.0.0.1", tcp_advertise_port=port)
    await runtime.endpoint("a.b.c").start_serving(echo)
    (complaint,) = complaints(caplog)
    assert f"does not reach itself at 127.0.0.1:{port}" in complaint


async def test_required_check_that_fails_ends_the_worker(open_runtime: OpenRuntime, closed_port: int) -> None:
    runtime = await open_runtime(
        tcp_advertise_host="127.0.0.1", tcp_advertise_port=closed_port, tcp_advertise_check="require"
    )
    with pytest.raises(ConfigError, match="does not reach itself"):
        await runtime.endpoint("a.b.c").start_serving(echo)
    assert (await runtime.registry.get_prefix("v1/instances/")).records == ()


async def test_check_can_be_turned_off(
    open_runtime: OpenRuntime, closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = await open_runtime(
        tcp_advertise_host="127.0.0.1", tcp_advertise_port=closed_port, tcp_advertise_check="off"
    )
    await runtime.endpoint("a.b.c").start_serving(echo)
    assert complaints(caplog) == []
