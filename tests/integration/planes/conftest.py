"""Brokers of the nats and redis planes, each of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from dynamo_redis.store.server import EmbeddedServer, find_server
from tests.broker_plane import Broker, NatsBroker, RedisBroker
from tests.nats_server import NatsServer, find_nats_server


@pytest.fixture
async def redis_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RedisBroker]:
    server = EmbeddedServer(tmp_path, binary=find_server())
    await server.start()
    monkeypatch.setenv("DYN_REDIS_URL", server.url)
    yield RedisBroker(server)
    await server.stop()


@pytest.fixture
def nats_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NatsBroker]:
    if find_nats_server() is None:
        pytest.skip("no nats-server on this machine; on Debian and Ubuntu: apt-get install nats-server")
    with NatsServer(tmp_path) as server:
        monkeypatch.setenv("NATS_SERVER", server.url)
        yield NatsBroker(server)


@pytest.fixture(params=["nats", "redis"])
def broker(request: pytest.FixtureRequest) -> Broker:
    found: Broker = request.getfixturevalue(f"{request.param}_broker")
    return found
