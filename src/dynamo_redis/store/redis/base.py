"""The interface of the clients of Redis: of one server (`client.py`), and of a cluster (`cluster/client.py`).

A cluster finds a node by a key. So methods take a key where their commands do not show one: `beside`, or
`key`. Other clients do not need it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Protocol

from dynamo_redis.errors import StoreError
from dynamo_redis.histogram import Histogram
from dynamo_redis.store.redis.blocking import Argument
from dynamo_redis.store.redis.subscription import ChannelSubscription
from dynamo_redis.store.redis.threads import ThreadConnection, ThreadScripts, do_nothing
from dynamo_redis.store.scripts import Script


class BlockingReads(Protocol):
    """One connection for commands that may block, all of them for keys of one hash tag. For one task at a
    time."""

    async def execute(self, command: bytes, *, block_s: float) -> Any:
        """Run a packed command that may block for `block_s`. After any StoreError the next call
        reconnects."""
        ...

    async def execute_all(self, commands: Sequence[bytes], *, block_s: float) -> list[Any]:
        """Run several commands as `execute`, in order and in one round trip. Raises the first error."""
        ...

    async def aclose(self) -> None:
        """Close the connection. Never waits for the server."""
        ...


class Sending(Protocol):
    """A connection for many commands at a time, each for a key of its own. For one task at a time."""

    async def execute_each(self, commands: Sequence[tuple[str, bytes]]) -> list[Any]:
        """Run packed commands, each with its key; the StoreError of one that is refused is its answer.

        Raises StoreError if the connection breaks."""
        ...

    async def aclose(self) -> None:
        """Close the connection. Never waits for the server."""
        ...


class StoreClient(Protocol):
    """A process's client of Redis. Connects at the first command; close it with `aclose`.

    `timeout_s` bounds each call, connecting included. Cancelling a call is safe. Then it is unknown whether
    the server ran the command.
    """

    timeout_s: float
    trips_s: Histogram

    @property
    def user(self) -> str: ...

    @property
    def address(self) -> str:
        """The server, for messages."""
        ...

    @property
    def closed(self) -> bool:
        """True after `aclose`: every call raises StoreUnavailable."""
        ...

    async def connect(self) -> None:
        """Check that the server answers, accepts the login and is recent enough. Raises StoreError."""
        ...

    async def execute(self, *command: Argument, beside: Argument | None = None) -> Any:
        """Run one command once; return the raw reply. Raises StoreError.

        `beside`: a key whose server runs a command that names no key."""
        ...

    async def script(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """Run a script by its hash; send its source only if the server does not know it. Raises
        StoreError."""
        ...

    async def pipeline(
        self, commands: Iterable[Sequence[Argument]], *, transaction: bool = False
    ) -> list[Any]:
        """Run commands in one round trip, in order; return their raw replies.

        With `transaction` atomic; then all keys have one hash tag. Raises StoreError for the first command
        that failed; the others may have run."""
        ...

    def scan(self, match: str, *, count: int = 500) -> AsyncIterator[bytes]:
        """Yield the keys that match a glob pattern. A key may come twice; a key made meanwhile may be
        missed."""
        ...

    async def pause(self, wait_s: float) -> None:
        """Wait before another attempt; end early if new connections lead to another server meanwhile."""
        ...

    def blocking(self, key: Argument) -> BlockingReads:
        """Return a connection for blocking reads of keys with this key's hash tag; its owner closes it."""
        ...

    def sending(self) -> Sending:
        """Return a connection that sends commands for many keys; its owner closes it."""
        ...

    async def subscribe(self, pattern: str, *, beside: Argument) -> ChannelSubscription:
        """Subscribe to a pattern of keyspace notifications of that key's server, on a separate connection.

        Raises StoreError."""
        ...

    async def subscribe_channel(self, channel: str) -> ChannelSubscription:
        """Subscribe to one channel, on a separate connection. Raises StoreError."""
        ...

    def sync(
        self, timeout_s: float, *, key: Argument, on_move: Callable[[], None] = do_nothing
    ) -> ThreadConnection:
        """Return a connection for another thread, for scripts with this key's hash tag. Each step of it waits
        at most `timeout_s`.

        `on_move` is called, from any thread, when new connections lead to another server.
        """
        ...

    def from_thread(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> ThreadScripts:
        """Return an access to this client's connections for a thread other than that of `loop`."""
        ...

    async def named(self, error: StoreError, keys: Sequence[Argument]) -> StoreError:
        """Return the error; if a key of a wrong type caused it, with that key and the command that repairs
        it."""
        ...

    def disconnect(self) -> None:
        """Close idle connections now, and others before their next use. For the event loop."""
        ...

    async def aclose(self) -> None:
        """Close the connections; later calls raise StoreUnavailable. Never raises for a dead server."""
        ...
