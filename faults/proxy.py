"""A TCP proxy that breaks connections in the ways that networks do.

To all connections or to one it can (`Conditions`): swallow requests, swallow answers, both (a black hole: the
target is not even dialled), stall, delay, slow down. Besides it can cut, half-close, refuse, and send new
connections elsewhere (`target`).

TCP never loses bytes in the middle of a stream. So a connection that has swallowed bytes never carries
anything again in that direction, and `heal` breaks it: the peers see silence, then an end.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Final, Literal, Protocol, Self

_READ_BYTES: Final = 1 << 16
_POLL_S: Final = 0.005

Side = Literal["client", "server"]


@dataclass(frozen=True, slots=True)
class Conditions:
    """The conditions of a connection. The default is a good network.

    `delay_s` is added to each piece, in each direction; `bytes_per_s` bounds each direction of a connection,
    `link_bytes_per_s` each direction of all connections of a proxy together.
    """

    swallow_requests: bool = False
    swallow_answers: bool = False
    stalled: bool = False
    delay_s: float = 0.0
    bytes_per_s: float | None = None
    link_bytes_per_s: float | None = None

    def swallows(self, towards: Side) -> bool:
        """Return whether bytes that travel to that side are thrown away."""
        return self.swallow_requests if towards == "server" else self.swallow_answers


GOOD: Final = Conditions()
BLACK_HOLE: Final = Conditions(swallow_requests=True, swallow_answers=True)
STALL: Final = Conditions(stalled=True)


class Connection:
    """One connection through a proxy: two pumps."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.conditions: Conditions | None = None
        self.swallowed = False
        self._proxy = proxy
        self._ends: dict[Side, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {
            "client": (reader, writer)
        }

    @property
    def _now(self) -> Conditions:
        return self.conditions or self._proxy.conditions

    async def run(self) -> None:
        """Carry bytes until one side breaks, or both have ended."""
        try:
            if self._now == BLACK_HOLE:
                await self._swallow_all()
            else:
                host, port = self._proxy.address
                self._ends["server"] = await asyncio.open_connection(host, port)
                await asyncio.gather(self._pump("server"), self._pump("client"))
        except (OSError, RuntimeError):  # uvloop raises the latter on a closed transport
            pass
        finally:
            self.cut()

    async def _swallow_all(self) -> None:
        self.swallowed = True
        reader, _ = self._ends["client"]
        while await reader.read(_READ_BYTES):
            pass

    async def _pump(self, towards: Side) -> None:
        reader, _ = self._ends["client" if towards == "server" else "server"]
        _, writer = self._ends[towards]
        has_swallowed = False
        try:
            while content := await reader.read(_READ_BYTES):
                while self._now.stalled:
                    await asyncio.sleep(_POLL_S)
                has_swallowed = has_swallowed or self._now.swallows(towards)
                if has_swallowed:
                    self.swallowed = True
                else:
                    await self._pass(self._proxy.translate(content, towards), towards)
            if not has_swallowed:
                writer.write_eof()
        except (OSError, RuntimeError):
            self.cut()  # the other direction ends as well

    async def _pass(self, content: bytes, towards: Side) -> None:
        _, writer = self._ends[towards]
        now = self._now
        if now.delay_s:
            await asyncio.sleep(now.delay_s)
        rate = now.bytes_per_s or now.link_bytes_per_s
        step = len(content) if rate is None else max(1, int(rate / 50))
        for start in range(0, len(content), step):
            piece = content[start : start + step]
            if now.link_bytes_per_s is not None:
                await self._proxy.turn(towards, len(piece) / now.link_bytes_per_s)
            writer.write(piece)
            await writer.drain()
            if now.bytes_per_s is not None:
                await asyncio.sleep(step / now.bytes_per_s)

    def half_close(self, towards: Side) -> None:
        """End one direction; the other goes on."""
        with contextlib.suppress(OSError, RuntimeError, KeyError):
            self._ends[towards][1].write_eof()

    def cut(self) -> None:
        """Break both sides at once, as a reset does."""
        for _, writer in self._ends.values():
            writer.transport.abort()


class Link(Protocol):
    """A process's way to its servers, of one proxy or several: the faults of `Proxy`."""

    conditions: Conditions
    refuse: bool

    @property
    def url(self) -> str: ...

    @property
    def connections(self) -> list[Connection]: ...

    @property
    def has_swallowed(self) -> bool: ...

    def cut(self) -> None: ...

    def cut_one(self) -> None: ...

    def half_close(self, towards: Side) -> None: ...

    def heal(self) -> None: ...

    async def aclose(self) -> None: ...


class Proxy:
    """Listens on a loopback port and carries connections to `target`, a `redis://host:port` URL.

    Use it as an async context manager, or `start` and `aclose` it.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.conditions = GOOD
        self.refuse = False
        self._url = ""
        self.connections: list[Connection] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._free_at: dict[Side, float] = {"client": 0.0, "server": 0.0}

    @property
    def url(self) -> str:
        """The address that it listens on; "" before `start`."""
        return self._url

    def translate(self, content: bytes, towards: Side) -> bytes:
        """Return the bytes to pass on in place of these."""
        del towards
        return content

    @property
    def has_swallowed(self) -> bool:
        """True if a connection that is still open has lost bytes: `heal` will break it."""
        return any(connection.swallowed for connection in self.connections)

    @property
    def address(self) -> tuple[str, int]:
        """Target of new connections."""
        host, _, port = self.target.removeprefix("redis://").partition(":")
        return host, int(port)

    async def start(self) -> None:
        """Listen; `url` has the address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def aclose(self) -> None:
        """Stop listening and break all connections."""
        if self._server is not None:
            self._server.close()
            self.refuse = True
            self.cut()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    # ------------------------------------------------------------------ faults

    def cut(self) -> None:
        """Break all connections."""
        for connection in list(self.connections):
            connection.cut()

    def cut_one(self) -> None:
        """Break the oldest connection."""
        if self.connections:
            self.connections[0].cut()

    def half_close(self, towards: Side) -> None:
        """Half-close all connections."""
        for connection in list(self.connections):
            connection.half_close(towards)

    def heal(self) -> None:
        """Return to a good network; connections that have lost bytes break."""
        self.conditions, self.refuse = GOOD, False
        for connection in list(self.connections):
            connection.conditions = None
            if connection.swallowed:
                connection.cut()

    # ------------------------------------------------------------------ connections

    async def turn(self, towards: Side, seconds: float) -> None:
        """Wait until the link, which carries one piece at a time, has carried this one."""
        now = asyncio.get_running_loop().time()
        self._free_at[towards] = max(now, self._free_at[towards]) + seconds
        await asyncio.sleep(self._free_at[towards] - now)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            writer.transport.abort()
            return
        connection = Connection(self, reader, writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections.append(connection)
        try:
            await connection.run()
        except asyncio.CancelledError:
            pass  # cancelled by `aclose`; asyncio's streams would log an error otherwise
        finally:
            self.connections.remove(connection)
            self._tasks.discard(task)
