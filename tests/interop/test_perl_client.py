"""A client in another language, written from docs/wire-protocol.md alone, against the real server."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import InvalidRequest, Overloaded
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.server import TcpServer

CLIENT = Path(__file__).with_name("client.pl")
SECRET = bytes(range(32))
INSTANCE = 0x694D98147D54BFDE
WINDOW = 7


class Endpoints:
    """The endpoints that the client calls."""

    def __init__(self) -> None:
        self.killed = asyncio.Event()
        self.ids: list[str] = []

    async def echo(self, request: Any, _: Context) -> Any:
        return request

    async def count(self, request: int, _: Context) -> AsyncIterator[int]:
        for number in range(request):
            yield number

    async def thrice(self, request: bytes, _: Context) -> AsyncIterator[bytes]:
        for _i in range(3):
            yield request

    async def full(self, _: Any, __: Context) -> None:
        raise Overloaded("full", 0.25)

    async def fails(self, _: Any, __: Context) -> AsyncIterator[str]:
        yield "first"
        raise InvalidRequest("as told")

    async def wait(self, _: Any, context: Context) -> AsyncIterator[str]:
        yield "first"
        await context.async_killed_or_stopped()
        yield "last words"

    async def hang(self, _: Any, context: Context) -> AsyncIterator[str]:
        self.ids.append(context.id())
        yield "first"
        try:
            await asyncio.sleep(60)
        finally:
            self.killed.set()

    async def killed_(self, _: Any, __: Context) -> int:
        await asyncio.wait_for(self.killed.wait(), 30)
        return 1

    async def total(self, messages: AsyncIterator[int], _: Context) -> int:
        return sum([message async for message in messages])


@pytest.fixture
async def server() -> AsyncIterator[TcpServer]:
    chosen = PlaneSettings.load(channel_buffer_count=WINDOW, cancel_grace_s=0)
    made = TcpServer(chosen, secret=SECRET, instance_id=INSTANCE)
    served = Endpoints()
    await made.start()
    singles = (served.echo, served.count, served.thrice, served.full, served.fails, served.wait, served.hang)
    for handler in singles:
        made.register(handler.__name__, handler)
    made.register("killed", served.killed_)
    made.register("total", served.total, request_stream=True)
    yield made
    await made.aclose()
    assert served.ids[1:] in ([], ["perl-1"])


async def run(server: TcpServer, secret: bytes) -> tuple[int | None, str]:
    """Run the client; return its exit code and its output."""
    perl = shutil.which("perl")
    if perl is None:
        pytest.skip("needs perl")
    probe = await asyncio.create_subprocess_exec(perl, "-MDigest::SHA", "-MIO::Socket::INET", "-e", "1")
    if await probe.wait():
        pytest.skip("needs perl with Digest::SHA and IO::Socket::INET, which come with it")
    host, port = server.address.rsplit(":", 1)
    process = await asyncio.create_subprocess_exec(
        perl,
        str(CLIENT),
        host,
        port,
        str(INSTANCE),
        secret.hex(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 40)
    except TimeoutError:
        process.kill()
        raise
    return process.returncode, output.decode()


async def test_client_in_perl_does_everything(server: TcpServer) -> None:
    code, output = await run(server, SECRET)
    assert code == 0, output
    assert "not ok" not in output
    assert output.count("\nok ") == 12, output
    assert server.in_flight_count == 0


async def test_client_in_perl_with_the_wrong_secret_is_refused(server: TcpServer) -> None:
    code, output = await run(server, bytes(32))
    assert (code, output) == (2, "refused: the server does not know the secret\n")
    assert server.in_flight_count == 0
