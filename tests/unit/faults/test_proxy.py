"""The proxy of the fault harness: each of its faults, against a server that echoes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from faults.proxy import BLACK_HOLE, STALL, Conditions, Proxy

QUIET_S = 0.05

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Echo:
    """Answers each message with a mark before it; remembers the messages, and whether the other side
    ended."""

    def __init__(self, mark: bytes = b"") -> None:
        self.received = b""
        self.ended = asyncio.Event()
        self.url = ""
        self._mark = mark
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def aclose(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while content := await reader.read(1 << 16):
                self.received += content
                writer.write(self._mark + content)
                await writer.drain()
        except OSError:
            pass
        self.ended.set()
        writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    server = Echo()
    await server.start()
    yield server
    await server.aclose()


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    async with Proxy(echo.url) as made:
        yield made


async def _connect(proxy: Proxy) -> Ends:
    return await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))


async def _says(reader: asyncio.StreamReader, text: bytes, timeout_s: float = 2.0) -> None:
    async with asyncio.timeout(timeout_s):
        assert await reader.readexactly(len(text)) == text


async def _is_silent(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(QUIET_S):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def _has_ended(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(30):
            return await reader.read(1) == b""
    except ConnectionError:
        return True


async def test_proxy_carries_bytes_both_ways_and_the_end(proxy: Proxy, echo: Echo) -> None:
    reader, writer = await _connect(proxy)
    writer.write(b"one")
    await _says(reader, b"one")
    writer.write_eof()
    assert await _has_ended(reader)
    assert echo.ended.is_set()
    writer.close()


async def test_swallowed_answers_are_lost_after_the_request_arrived(proxy: Proxy, echo: Echo) -> None:
    reader, writer = await _connect(proxy)
    proxy.conditions = Conditions(swallow_answers=True)
    writer.write(b"lost")
    assert await _is_silent(reader)
    assert echo.received == b"lost"
    assert proxy.has_swallowed
    proxy.heal()
    assert await _has_ended(reader), "a stream that lost bytes never goes on"
    writer.close()


async def test_swallowed_requests_never_arrive(proxy: Proxy, echo: Echo) -> None:
    reader, writer = await _connect(proxy)
    writer.write(b"a")
    await _says(reader, b"a")
    proxy.conditions = Conditions(swallow_requests=True)
    writer.write(b"b")
    assert await _is_silent(reader)
    proxy.conditions = Conditions()
    writer.write(b"c")
    assert await _is_silent(reader), "nor what follows on the same connection"
    assert echo.received == b"a"
    proxy.heal()
    assert await _has_ended(reader)
    writer.close()


async def test_black_hole_accepts_and_never_answers(proxy: Proxy, echo: Echo) -> None:
    proxy.conditions = BLACK_HOLE
    reader, writer = await _connect(proxy)
    writer.write(b"anybody?")
    assert await _is_silent(reader)
    assert echo.received == b""
    proxy.heal()
    assert await _has_ended(reader)
    writer.close()


async def test_all_bytes_arrive_after_a_stall(proxy: Proxy, echo: Echo) -> None:
    reader, writer = await _connect(proxy)
    writer.write(b"1")
    await _says(reader, b"1")
    proxy.conditions = STALL
    writer.write(b"2")
    assert await _is_silent(reader)
    proxy.heal()
    await _says(reader, b"2")
    writer.close()


async def test_slow_connection_keeps_its_rate(proxy: Proxy) -> None:
    proxy.conditions = Conditions(bytes_per_s=20_000, delay_s=0.02)
    reader, writer = await _connect(proxy)
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    writer.write(b"x" * 4000)
    await _says(reader, b"x" * 4000, timeout_s=5.0)
    assert loop.time() - began_at >= 0.2
    writer.close()


async def test_conditions_of_one_connection_leave_the_others_alone(proxy: Proxy) -> None:
    slow, slow_writer = await _connect(proxy)
    slow_writer.write(b"1")
    await _says(slow, b"1")
    proxy.connections[0].conditions = STALL
    reader, writer = await _connect(proxy)
    writer.write(b"2")
    slow_writer.write(b"3")
    await _says(reader, b"2")
    assert await _is_silent(slow)
    proxy.heal()
    await _says(slow, b"3")
    for end in (writer, slow_writer):
        end.close()


async def test_cut_breaks_all_and_cut_one_the_oldest(proxy: Proxy) -> None:
    first, first_writer = await _connect(proxy)
    first_writer.write(b"1")
    await _says(first, b"1")
    second, second_writer = await _connect(proxy)
    second_writer.write(b"2")
    await _says(second, b"2")
    proxy.cut_one()
    assert await _has_ended(first)
    second_writer.write(b"3")
    await _says(second, b"3")
    proxy.cut()
    assert await _has_ended(second)
    for end in (first_writer, second_writer):
        end.close()


@pytest.mark.parametrize("side", ["client", "server"])
async def test_half_close_leaves_the_other_direction_open(proxy: Proxy, echo: Echo, side: str) -> None:
    reader, writer = await _connect(proxy)
    writer.write(b"1")
    await _says(reader, b"1")
    if side == "client":
        proxy.half_close("client")
        assert await _has_ended(reader)
        writer.write(b"2")
        async with asyncio.timeout(30):
            while echo.received != b"12":
                await asyncio.sleep(0.005)
    else:
        proxy.half_close("server")
        async with asyncio.timeout(30):
            await echo.ended.wait()
        assert await _has_ended(reader), "the server answered with its own end"
    writer.close()


async def test_refused_connections_break_at_once_and_the_rest_stay(proxy: Proxy) -> None:
    old, old_writer = await _connect(proxy)
    old_writer.write(b"1")
    await _says(old, b"1")
    proxy.refuse = True
    reader, writer = await _connect(proxy)
    assert await _has_ended(reader)
    old_writer.write(b"2")
    await _says(old, b"2")
    for end in (writer, old_writer):
        end.close()


async def test_new_target_is_for_new_connections(proxy: Proxy) -> None:
    other = Echo(mark=b"other ")
    await other.start()
    old, old_writer = await _connect(proxy)
    old_writer.write(b"1")
    await _says(old, b"1")
    proxy.target = other.url
    reader, writer = await _connect(proxy)
    writer.write(b"2")
    await _says(reader, b"other 2")
    old_writer.write(b"3")
    await _says(old, b"3")
    for end in (writer, old_writer):
        end.close()
    await proxy.aclose()
    await other.aclose()


async def test_refusing_target_ends_the_connection(proxy: Proxy, echo: Echo) -> None:
    await echo.aclose()
    reader, writer = await _connect(proxy)
    assert await _has_ended(reader)
    writer.close()
    await echo.start()  # the fixture closes it
