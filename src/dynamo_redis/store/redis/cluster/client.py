"""A client of a cluster: a `RedisClient` for each node, and the node for each key.

A node that does not serve a key says which one does (`redirects.py`), and has not run the command: it is sent
again, to that node, within the deadline of the call. All other errors are raised as by `RedisClient`, since
only the caller knows which command may be repeated. A node that cannot be used is reported to the topology,
which then looks for the replica that takes its place.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any, Final, TypeVar

from dynamo_redis.backoff import Backoff
from dynamo_redis.config import RedisLogin
from dynamo_redis.errors import StoreError, StoreUnavailable
from dynamo_redis.histogram import Histogram
from dynamo_redis.store.redis.base import BlockingReads, Sending
from dynamo_redis.store.redis.blocking import Argument, BlockingConnection
from dynamo_redis.store.redis.client import TRIP_LIMITS_S, RedisClient
from dynamo_redis.store.redis.cluster.connections import (
    FIRST_WAIT_S,
    LONGEST_WAIT_S,
    SlotReads,
    SlotThread,
    SpreadSending,
)
from dynamo_redis.store.redis.cluster.redirects import ASKING, Ask, Moved, TryAgain, redirect_of
from dynamo_redis.store.redis.cluster.routes import NodeRoute, SlotRoute
from dynamo_redis.store.redis.cluster.slots import key_of, slot_of_key
from dynamo_redis.store.redis.cluster.topology import Topology
from dynamo_redis.store.redis.server_errors import RouteError, store_error
from dynamo_redis.store.redis.subscription import ChannelSubscription
from dynamo_redis.store.redis.threads import (
    EventLoopScripts,
    SyncConnection,
    ThreadConnection,
    ThreadScripts,
    do_nothing,
)
from dynamo_redis.store.redis.url import Address, parse_server_url
from dynamo_redis.store.scripts import Script

_T = TypeVar("_T")

PROMPT_MOVES_COUNT: Final = 2
"""Redirects of a call that are followed without a pause; more show that the nodes do not agree yet."""


class ClusterClient:
    """`StoreClient` of a cluster. The URL names some of its nodes; the others are found by them."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        client_name: str = "dynamo-redis",
        login: RedisLogin | None = None,
    ) -> None:
        """Raises ConfigError for a URL that cannot be used."""
        self.timeout_s = timeout_s
        self._client_name = client_name
        self._url = parse_server_url(url, login)
        self._credentials = self._url.credentials()
        self._topology = Topology.shared(self._url)
        self._nodes: dict[Address, RedisClient] = {}
        self._slots: dict[int, RedisClient] = {}
        self._clients_lock = Lock()
        self.trips_s = Histogram(TRIP_LIMITS_S)
        """The durations of commands, scripts and pipelines that were answered."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._change = asyncio.Event()
        self._topology.add_listener(self._on_change)
        self._closed = False

    def __repr__(self) -> str:
        return f"<ClusterClient {self.address}>"

    @property
    def address(self) -> str:
        """As `StoreClient.address`: the nodes in the URL."""
        return self._topology.address

    @property
    def user(self) -> str:
        """As `StoreClient.user`."""
        return self._url.user

    @property
    def closed(self) -> bool:
        """As `StoreClient.closed`."""
        return self._closed

    # ------------------------------------------------------------------ commands

    async def connect(self) -> None:
        """As `StoreClient.connect`, at each master. A master that does not answer is one of a cluster that
        may mend itself: it is an error only if none answers."""
        self._check_open()
        await self._owner(0)
        masters = self._topology.masters
        outcomes = await asyncio.gather(*(self._node(at).connect() for at in masters), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in failures:
            if not isinstance(failure, StoreUnavailable) or len(failures) == len(masters):
                raise failure

    async def execute(self, *command: Argument, beside: Argument | None = None) -> Any:
        """As `StoreClient.execute`."""

        async def run(node: RedisClient, is_asking: bool) -> Any:
            if is_asking:
                return _second(await node.each([(ASKING,), command]))
            return await node.execute(*command)

        return await self._routed(beside if beside is not None else key_of(command), run)

    async def script(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """As `StoreClient.script`."""

        async def run(node: RedisClient, is_asking: bool) -> Any:
            if is_asking:
                command = ("EVAL", script.source, len(keys), *keys, *args)
                return _second(await node.each([(ASKING,), command]))
            return await node.script(script, keys, args)

        return await self._routed(keys[0], run)

    async def pipeline(
        self, commands: Iterable[Sequence[Argument]], *, transaction: bool = False
    ) -> list[Any]:
        """As `StoreClient.pipeline`: one round trip to each node, at the same time."""
        commands = list(commands)
        if transaction:
            return await self._transaction(commands)
        answers: list[Any] = [None] * len(commands)
        by_node: dict[Address, list[int]] = defaultdict(list)
        for place, command in enumerate(commands):
            by_node[await self._owner_of(key_of(command))].append(place)

        async def run(at: Address, places: list[int]) -> None:
            for place, answer in zip(
                places, await self._node(at).each([commands[place] for place in places]), strict=True
            ):
                answers[place] = answer

        await _all(run(at, places) for at, places in by_node.items())
        for place, answer in enumerate(answers):
            if isinstance(answer, StoreError):
                command = commands[place]
                if redirect_of(answer, None) is None:
                    raise await self.named(answer, command[1:2])
                answers[place] = await self.execute(*command)
        return answers

    async def _transaction(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        async def run(node: RedisClient, is_asking: bool) -> list[Any]:
            if not is_asking:
                return await node.pipeline(commands, transaction=True)
            # The node accepts all commands up to EXEC.
            answers = await node.each([(ASKING,), ("MULTI",), *commands, ("EXEC",)])
            refused = next((answer for answer in answers if isinstance(answer, StoreError)), None)
            if refused is not None:
                raise refused
            done: list[Any] = answers[-1]
            return done

        return await self._routed(key_of(commands[0]), run)

    async def scan(self, match: str, *, count: int = 500) -> AsyncIterator[bytes]:
        """As `StoreClient.scan`, over all masters. A key that moves meanwhile may be missed."""
        await self._owner(0)
        for at in self._topology.masters:
            async for key in self._node(at).scan(match, count=count):
                yield key

    # ------------------------------------------------------------------ the node of a key

    async def _routed(self, key: Argument | None, run: Callable[[RedisClient, bool], Awaitable[_T]]) -> _T:
        """Run a command at the node of a key, and again where nodes redirect it. Raises StoreError.

        `run` gets the client of a node, and whether the node must be told that its slot is moving to it."""
        self._check_open()
        deadline = time.monotonic() + self.timeout_s
        backoff = Backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
        target: Address | None = None
        moves_count = 0
        while True:
            at = target or await self._owner_of(key)
            try:
                return await run(self._node(at), target is not None)
            except StoreError as exc:
                redirect = redirect_of(exc, at)
                if redirect is None:
                    if not exc.answered:
                        self._topology.suspect()
                    raise
                if time.monotonic() > deadline:
                    raise
                target = None
                match redirect:
                    case Moved(slot, owner):
                        self._topology.note_moved(slot, owner)
                        moves_count += 1
                        if moves_count <= PROMPT_MOVES_COUNT:
                            continue
                    case Ask(at):
                        target = at
                        continue
                    case TryAgain():
                        pass
            await asyncio.sleep(backoff.next_s())

    async def _owner_of(self, key: Argument | None) -> Address:
        return await self._owner(0 if key is None else slot_of_key(key))

    async def _owner(self, slot: int) -> Address:
        """Return the master of a slot. Raises StoreError."""
        at = self._topology.owner(slot)
        if at is not None:
            return at
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._topology.find(slot)
        except (RouteError, TimeoutError) as exc:
            raise store_error(exc, self.address) from exc

    def _node(self, at: Address) -> RedisClient:
        """Return the client of a node."""
        return self._client_of(self._nodes, at, lambda: NodeRoute(self._topology, at))

    def _slot(self, key: Argument) -> tuple[int, RedisClient]:
        """Return a slot, and the client whose connections follow it."""
        slot = slot_of_key(key)
        return slot, self._client_of(self._slots, slot, lambda: SlotRoute(self._topology, slot))

    def _client_of(
        self, clients: dict[_T, RedisClient], name: _T, route: Callable[[], NodeRoute | SlotRoute]
    ) -> RedisClient:
        self._check_open(needs_loop=False)
        with self._clients_lock:  # a thread may ask, too
            client = clients.get(name)
            if client is None:
                client = clients[name] = RedisClient(
                    self._url.url,
                    timeout_s=self.timeout_s,
                    client_name=self._client_name,
                    route=route(),
                    login=self._url.login,
                )
                client.trips_s = self.trips_s
            return client

    # ------------------------------------------------------------------ other connections

    def blocking(self, key: Argument) -> BlockingReads:
        """As `StoreClient.blocking`."""
        slot, client = self._slot(key)
        return SlotReads(self._topology, slot, client.blocking(), self._blocking_at, self.timeout_s)

    def sending(self) -> Sending:
        """As `StoreClient.sending`."""
        return SpreadSending(self._topology, self._blocking_at, self.timeout_s)

    def _blocking_at(self, at: Address) -> BlockingConnection:
        return self._node(at).blocking()

    async def subscribe(self, pattern: str, *, beside: Argument) -> ChannelSubscription:
        """As `StoreClient.subscribe`: only the master of a key tells what happens to it."""
        return await self._slot(beside)[1].subscribe(pattern, beside=beside)

    async def subscribe_channel(self, channel: str) -> ChannelSubscription:
        """As `StoreClient.subscribe_channel`, at the node of the channel's slot. A cluster sends a message to
        all nodes."""
        return await self._slot(channel)[1].subscribe_channel(channel)

    def sync(
        self, timeout_s: float, *, key: Argument, on_move: Callable[[], None] = do_nothing
    ) -> ThreadConnection:
        """As `StoreClient.sync`."""

        def at_node(at: Address) -> SyncConnection:
            return self._node(at).sync(timeout_s)

        slot, client = self._slot(key)
        return SlotThread(self._topology, slot, client.sync(timeout_s, on_move=on_move), at_node, timeout_s)

    def from_thread(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> ThreadScripts:
        """As `StoreClient.from_thread`."""
        return EventLoopScripts(self.script, lambda: self.address, loop, timeout_s)

    # ------------------------------------------------------------------ changes and the end

    async def pause(self, wait_s: float) -> None:
        """As `StoreClient.pause`."""
        change = self._change
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await change.wait()

    def _on_change(self) -> None:
        """End pauses: other nodes serve some slots now. Called from any thread."""

        def end_pauses() -> None:
            self._change.set()
            self._change = asyncio.Event()

        if self._loop is not None:
            with suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(end_pauses)

    async def named(self, error: StoreError, keys: Sequence[Argument]) -> StoreError:
        """As `StoreClient.named`."""
        if (
            error.answer_code != "WRONGTYPE"
            or not keys
            or (at := self._topology.owner(slot_of_key(keys[0]))) is None
        ):
            return error
        return await self._node(at).named(error, keys)

    def disconnect(self) -> None:
        """As `StoreClient.disconnect`."""
        for client in self._clients():
            client.disconnect()

    async def aclose(self) -> None:
        """As `StoreClient.aclose`."""
        if not self._closed:
            self._closed = True
            self._topology.remove_listener(self._on_change)
            self._topology.release()
            if self._credentials is not None:
                self._credentials.release()
        await asyncio.gather(*(client.aclose() for client in self._clients()))

    def _clients(self) -> list[RedisClient]:
        with self._clients_lock:
            return [*self._nodes.values(), *self._slots.values()]

    def _check_open(self, *, needs_loop: bool = True) -> None:
        if self._closed:
            raise StoreUnavailable(f"the connection to Redis at {self.address} has been closed")
        if self._loop is None and needs_loop:
            self._loop = asyncio.get_running_loop()


def _second(answers: Sequence[Any]) -> Any:
    """Return the answer to the command after ASKING. Raises StoreError."""
    refused = next((answer for answer in answers if isinstance(answer, StoreError)), None)
    if refused is not None:
        raise refused
    return answers[1]


async def _all(works: Iterable[Awaitable[None]]) -> None:
    """Wait for all works; then raise the first error."""
    outcomes = await asyncio.gather(*works, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
