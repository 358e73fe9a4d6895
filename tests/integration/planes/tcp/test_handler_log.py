"""Log lines about handlers that raise."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import HandlerFailed
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames import server_request
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from tests.tcp_plane import INSTANCE, SECRET

_EMPTY: dict[str, Any] = {}


class Deployment:
    def __init__(self, server: TcpServer, client: TcpClient) -> None:
        self.server = server
        self._client = client

    async def fail(self, request: str, request_id: str) -> None:
        target = Target(INSTANCE, self.server.address, "fail", SECRET)
        with pytest.raises(HandlerFailed):
            await anext(self._client.open(target, request, Context(request_id)))


@pytest.fixture
async def deployed() -> AsyncIterator[Deployment]:
    async def fail(request: str, _: Context) -> Any:
        if request == "key":
            return _EMPTY[request]
        raise {"memory": MemoryError, "lookup": LookupError}.get(request, ValueError)(request)

    server = TcpServer(PlaneSettings.load(tcp_host="127.0.0.1"), secret=SECRET, instance_id=INSTANCE)
    server.register("fail", fail)
    await server.start()
    client = TcpClient(PlaneSettings())
    yield Deployment(server, client)
    await client.aclose()
    await server.aclose()


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [r for r in caplog.records if r.name == server_request.__name__ and r.levelno == logging.ERROR]


async def test_five_faults_are_five_lines(deployed: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    """Failures of other types, texts or places in the code; each names its request and has its traceback."""
    for number, fault in enumerate(("key", "memory", "lookup", "value 1", "value 2")):
        for repetition in range(3):
            await deployed.fail(fault, f"request-{number}-{repetition}")
    said = lines(caplog)
    assert [record.getMessage() for record in said] == [
        f"the handler of fail raised on request request-{number}-0" for number in range(5)
    ]
    assert all(record.exc_info is not None and record.exc_info[2] is not None for record in said)
