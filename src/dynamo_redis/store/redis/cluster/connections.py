"""Connections of a cluster's clients that are bound to a slot: they follow it from node to node."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Final

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import StoreError, StoreUnavailable
from dynamo_redis.store.redis.blocking import Argument, BlockingConnection, pack
from dynamo_redis.store.redis.cluster.redirects import ASKING, Ask, Moved, TryAgain, redirect_of
from dynamo_redis.store.redis.cluster.slots import slot_of_key
from dynamo_redis.store.redis.cluster.topology import Topology
from dynamo_redis.store.redis.server_errors import RouteError
from dynamo_redis.store.redis.threads import SyncConnection
from dynamo_redis.store.redis.url import Address
from dynamo_redis.store.scripts import Script

FIRST_WAIT_S: Final = 0.005
LONGEST_WAIT_S: Final = 0.1
"""Pauses before a command is sent again to a node that is moving its keys."""

_ASKING: Final = pack(ASKING)
_AGAIN: Final = object()
_UNBLOCKED: Final = ("UNBLOCKED", "NOGROUP")
"""Codes of the end of a waiting read whose key has gone: deleted, or moved to another node."""


def _note_failure(topology: Topology, error: StoreError) -> None:
    """Suspect the node if it has not answered. That it takes connections says little: a proxy, or a process
    that is about to end, does so, too."""
    if not error.answered:
        topology.suspect()


class SlotReads:
    """`BlockingReads` of a slot. For one task at a time.

    `at_slot` is a connection to the master of the slot, and `at_node` makes one to a given node, which is
    used while the slot moves there.
    """

    def __init__(
        self,
        topology: Topology,
        slot: int,
        at_slot: BlockingConnection,
        at_node: Callable[[Address], BlockingConnection],
        timeout_s: float,
    ) -> None:
        self._topology = topology
        self._slot = slot
        self._at_slot = at_slot
        self._at_node = at_node
        self._timeout_s = timeout_s
        self._target: tuple[Address, BlockingConnection] | None = None

    async def execute(self, command: bytes, *, block_s: float) -> Any:
        """As `BlockingReads.execute`."""
        return (await self.execute_all((command,), block_s=block_s))[0]

    async def execute_all(self, commands: Sequence[bytes], *, block_s: float) -> list[Any]:
        """As `BlockingReads.execute_all`. Commands that a node refused because the slot moves are sent
        again."""
        answers: list[Any] = [None] * len(commands)
        waiting = list(range(len(commands)))
        deadline = time.monotonic() + self._timeout_s
        backoff = Backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
        for tries_count in count():
            if tries_count > 1:
                await asyncio.sleep(backoff.next_s())
            try:
                got = await self._at_slot.execute_each(
                    [commands[place] for place in waiting], block_s=block_s
                )
            except StoreError as exc:
                _note_failure(self._topology, exc)
                raise
            again = []
            for place, answer in zip(waiting, got, strict=True):
                answers[place] = answer
                if isinstance(answer, StoreError):
                    answers[place] = await self._redirected(answer, commands[place], block_s)
                if answers[place] is _AGAIN:
                    again.append(place)
                    # An ended read is sent once more: the answer tells whether its key has moved, or is gone.
                    if time.monotonic() > deadline or (answer.answer_code in _UNBLOCKED and tries_count):
                        raise answer
            if not again:
                return answers
            waiting = again
        raise AssertionError  # count() does not end

    async def _redirected(self, error: StoreError, command: bytes, block_s: float) -> Any:
        """Return the answer of another node to a command that was refused, or `_AGAIN` if it has to be sent
        again. Raises `error` if it is no redirect."""
        match redirect_of(error, self._topology.owner(self._slot)):
            case Ask(at):
                try:
                    return await self._ask(at, command, block_s)
                except StoreError as exc:
                    if not isinstance(redirect_of(exc, at), TryAgain | Moved):
                        raise
            case Moved(slot, at):
                self._topology.note_moved(slot, at)
            case None if error.answer_code not in _UNBLOCKED:
                raise error
        return _AGAIN

    async def _ask(self, at: Address, command: bytes, block_s: float) -> Any:
        """Run a command at the node to which the slot moves."""
        if self._target is not None and self._target[0] != at:
            await self._target[1].aclose()
            self._target = None
        if self._target is None:
            self._target = (at, self._at_node(at))
        return (await self._target[1].execute_all((_ASKING, command), block_s=block_s))[1]

    async def aclose(self) -> None:
        """Close the connections. Never waits for the server."""
        await self._at_slot.aclose()
        if self._target is not None:
            await self._target[1].aclose()


class SlotThread:
    """`ThreadConnection` of a slot, made of connections to nodes, as `SlotReads`."""

    def __init__(
        self,
        topology: Topology,
        slot: int,
        at_slot: SyncConnection,
        at_node: Callable[[Address], SyncConnection],
        timeout_s: float,
    ) -> None:
        self._topology = topology
        self._slot = slot
        self._at_slot = at_slot
        self._at_node = at_node
        self._timeout_s = timeout_s
        self._target: tuple[Address, SyncConnection] | None = None

    def script(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """As `SyncConnection.script`, sent again while the slot moves."""
        deadline = time.monotonic() + self._timeout_s
        backoff = Backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
        target: Address | None = None
        while True:
            try:
                if target is None:
                    return self._at_slot.script(script, keys, args)
                return self._asked(target).script_asking(script, keys, args)
            except StoreError as exc:
                redirect = redirect_of(exc, target or self._topology.owner(self._slot))
                if redirect is None or time.monotonic() > deadline:
                    _note_failure(self._topology, exc)
                    raise
                target = None
                match redirect:
                    case Moved(slot, at):
                        self._topology.note_moved(slot, at)
                    case Ask(at):
                        target = at
                        continue
                    case TryAgain():
                        pass
                time.sleep(backoff.next_s())

    def _asked(self, at: Address) -> SyncConnection:
        if self._target is not None and self._target[0] != at:
            self._target[1].close()
            self._target = None
        if self._target is None:
            self._target = (at, self._at_node(at))
        return self._target[1]

    def connect(self) -> None:
        """As `SyncConnection.connect`."""
        self._at_slot.connect()

    def abort(self) -> None:
        """As `SyncConnection.abort`."""
        self._at_slot.abort()
        if (target := self._target) is not None:
            target[1].abort()

    def close(self) -> None:
        """As `SyncConnection.close`."""
        self._at_slot.close()
        if self._target is not None:
            self._target[1].close()


class SpreadSending:
    """`Sending` over a cluster: a connection to each node, made by `at_node` at its first command.

    A node that cannot be reached fails its own commands only.
    """

    def __init__(
        self, topology: Topology, at_node: Callable[[Address], BlockingConnection], timeout_s: float
    ) -> None:
        self._topology = topology
        self._at_node = at_node
        self._timeout_s = timeout_s
        self._connections: dict[Address, BlockingConnection] = {}

    async def execute_each(self, commands: Sequence[tuple[str, bytes]]) -> list[Any]:
        """As `Sending.execute_each`. Never raises StoreError: it is among the answers."""
        answers: list[Any] = [None] * len(commands)
        waiting: dict[int, Address | None] = dict.fromkeys(range(len(commands)))  # a node to ask, by place
        deadline = time.monotonic() + self._timeout_s
        backoff = Backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
        for tries_count in count():
            if tries_count > 1:
                await asyncio.sleep(backoff.next_s())
            await self._send(commands, waiting, answers)
            again: dict[int, Address | None] = {}
            for place, target in waiting.items():
                answer, slot = answers[place], slot_of_key(commands[place][0])
                if not isinstance(answer, StoreError) or time.monotonic() > deadline:
                    continue
                match redirect_of(answer, target or self._topology.owner(slot)):
                    case Moved(moved, at):
                        self._topology.note_moved(moved, at)
                        again[place] = None
                    case Ask(at):
                        again[place] = at
                    case TryAgain():
                        again[place] = None
            if not again:
                return answers
            waiting = again
        raise AssertionError  # count() does not end

    async def _send(
        self, commands: Sequence[tuple[str, bytes]], waiting: dict[int, Address | None], answers: list[Any]
    ) -> None:
        """Send each command in `waiting` to its node, and note its answer."""
        by_node: dict[tuple[Address, bool], list[int]] = defaultdict(list)
        for place, target in waiting.items():
            try:
                at = target or await self._topology.find(slot_of_key(commands[place][0]))
            except RouteError as exc:
                answers[place] = StoreUnavailable(str(exc))
                continue
            by_node[at, target is not None].append(place)

        async def send(at: Address, places: list[int], is_asking: bool) -> None:
            connection = self._connections.get(at)
            if connection is None:
                connection = self._connections[at] = self._at_node(at)
            words = [commands[place][1] for place in places]
            if is_asking:
                words = [word for command in words for word in (_ASKING, command)]
            try:
                got = await connection.execute_each(words)
            except StoreError as exc:
                _note_failure(self._topology, exc)
                got = [exc] * len(words)
            for place, answer in zip(places, got[1::2] if is_asking else got, strict=True):
                answers[place] = answer

        # One after the other for the two kinds of one node, which share a connection.
        for asks in (False, True):
            sends = [send(at, places, asks) for (at, asking), places in by_node.items() if asking == asks]
            if len(sends) == 1:
                await sends[0]
            elif sends:
                await asyncio.gather(*sends)

    async def aclose(self) -> None:
        """As `Sending.aclose`."""
        for connection in self._connections.values():
            await connection.aclose()
