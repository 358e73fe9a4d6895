"""The nodes of a cluster, and the master that serves each slot.

All clients of a process with the same URL share one `Topology`. It has a thread with an event loop of its
own, so that the keepalive thread does not depend on the application's event loop. The thread asks some nodes
for their view (CLUSTER SLOTS, which every server has): at the first use, each `REFRESH_S`, and at once when a
node names another one, cannot be reached, or leaves a command without an answer. After the latter it asks
again each `TROUBLE_REFRESH_S`, so that a replica that takes over is found soon.

Nodes may have an old view, so several are asked, and each slot belongs to the master that most of them name.
A node's MOVED counts at once, and for `MOVED_COUNTS_S` against other nodes, which may not have heard of it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol
from weakref import WeakSet

from redis import exceptions as redis_errors
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from dynamo_redis.backoff import Backoff
from dynamo_redis.store.keys import SLOTS_COUNT
from dynamo_redis.store.redis.own_thread import OwnThread
from dynamo_redis.store.redis.server_errors import (
    RouteError,
    drop,
    drop_upon_failures,
    is_about_password,
    is_about_tls,
    one_line,
    prepare,
    reply,
    store_error,
)
from dynamo_redis.store.redis.url import Address, ServerUrl, make_connection, show_address

logger = logging.getLogger(__name__)

REFRESH_S: Final = 10.0
"""Interval at which nodes are asked while nothing seems to be wrong."""
TROUBLE_REFRESH_S: Final = 0.1
"""Interval after a node could not be used, jittered up to twice of it."""
TROUBLE_S: Final = 5.0
"""Time for which a node that could not be used counts as trouble."""
ASK_TIMEOUT_S: Final = 1.0
"""Longest wait for a node's answer, connecting included."""
OTHERS_WAIT_S: Final = 0.1
"""Longest wait for other nodes after the first has answered."""
MOVED_COUNTS_S: Final = 2.0
"""Time for which a MOVED counts against the views of nodes."""
ASKED_COUNT: Final = 3
"""Nodes that are asked at the same time."""


_View = list[tuple[int, int, Address, tuple[Address, ...]]]
"""A node's view: first and last slot, the master that serves them, and all nodes named."""


class ClusterRoute(Protocol):
    """A route to a node, which has to know of changes."""

    def check(self) -> None:
        """Compare with the topology, and leave a node that is the wrong one now. From any thread."""
        ...


class Topology(OwnThread[ServerUrl]):
    """The present view of a cluster. Made by `shared`; safe from any thread."""

    def __init__(self, url: ServerUrl) -> None:
        super().__init__(url)
        self._url = url
        self._owners: list[Address | None] = [None] * SLOTS_COUNT
        self._nodes: dict[Address, None] = {}
        self._masters: tuple[Address, ...] = ()
        self._has_view = False
        self._moved_until: dict[int, float] = {}
        """By slot: the time until which its owner counts, since a node has just named it."""
        self._routes: WeakSet[ClusterRoute] = WeakSet()
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._asking: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._trouble_until = 0.0

    @property
    def thread_name(self) -> str:
        return f"nodes of {self.address}"

    @property
    def address(self) -> str:
        """The cluster, for messages."""
        return ",".join(map(show_address, self._url.nodes))

    # ------------------------------------------------------------------ from any thread

    def owner(self, slot: int) -> Address | None:
        """Return the master that serves a slot, as far as is known."""
        return self._owners[slot]

    @property
    def masters(self) -> tuple[Address, ...]:
        """All masters that serve slots, as far as is known."""
        return self._masters

    async def find(self, slot: int) -> Address:
        """Return the master that serves a slot; ask the nodes if it is not known.

        Raises RouteError if no node knows one. Cancelling it is safe.
        """
        if (at := self._owners[slot]) is not None:
            return at
        return await self.run(self._find(slot))

    def find_in_thread(self, slot: int, timeout_s: float) -> Address:
        """As `find`, for a thread."""
        if (at := self._owners[slot]) is not None:
            return at
        try:
            return self.run_in_thread(self._find(slot), timeout_s)
        except TimeoutError as exc:
            raise RouteError(f"no node of the cluster {self.address} answers in time") from exc

    def note_moved(self, slot: int, at: Address) -> None:
        """Note that a node has named another one for a slot."""
        with self._lock:
            is_news = self._owners[slot] != at
            self._owners[slot] = at
            self._nodes.setdefault(at)
            self._moved_until[slot] = time.monotonic() + MOVED_COUNTS_S
            self._set_masters()
        if is_news:
            self._notify()
        self._wake_up()

    def suspect(self) -> None:
        """Note that a node could not be used: another one may take its place soon."""
        self._trouble_until = time.monotonic() + TROUBLE_S
        self._wake_up()

    def add_route(self, route: ClusterRoute) -> None:
        """Tell a route of changes for as long as it exists."""
        with self._lock:
            self._routes.add(route)

    def add_listener(self, changed: Callable[[], None]) -> None:
        """Call `changed` after each change, from any thread. It must not raise."""
        with self._lock:
            self._listeners.append(changed)

    def remove_listener(self, changed: Callable[[], None]) -> None:
        """Call `changed` no longer."""
        with self._lock:
            self._listeners.remove(changed)

    def _set_masters(self) -> None:
        self._masters = tuple(dict.fromkeys(at for at in self._owners if at is not None))

    def _notify(self) -> None:
        with self._lock:
            routes, listeners = tuple(self._routes), tuple(self._listeners)
        for route in routes:
            route.check()
        for changed in listeners:
            changed()

    def _wake_up(self) -> None:
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(self._wake.set)

    # ------------------------------------------------------------------ in the thread

    async def _find(self, slot: int) -> Address:
        await self._refresh()
        at = self._owners[slot]
        if at is None:
            self.suspect()
            raise RouteError(f"no node of the cluster {self.address} serves slot {slot}: it is not whole")
        return at

    async def _keep(self) -> None:
        """Ask again from time to time, and when something changes."""
        backoff = Backoff(TROUBLE_REFRESH_S, 2.0)
        while True:
            if time.monotonic() < self._trouble_until:
                pause_s = TROUBLE_REFRESH_S * random.uniform(1.0, 2.0)  # noqa: S311 - jitter
                await asyncio.sleep(pause_s)
            else:
                try:
                    async with asyncio.timeout(REFRESH_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass
            self._wake.clear()
            try:
                await self._refresh()
                backoff.reset()
            except RouteError as exc:
                logger.debug("%s", exc)
                await asyncio.sleep(backoff.next_s())
            except Exception:
                logger.exception("the nodes of the cluster %s cannot be asked, trying again", self.address)
                await asyncio.sleep(backoff.next_s())

    async def _refresh(self) -> None:
        """Ask nodes, and note what they say; callers at the same time share the answers. Raises
        RouteError."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._asking)

    async def _ask(self) -> None:
        known = [*self._nodes, *self._url.nodes]
        nodes = list(dict.fromkeys(random.sample(known, len(known))))
        failures: list[Exception] = []
        while nodes:
            asked, nodes = nodes[:ASKED_COUNT], nodes[ASKED_COUNT:]
            views = await self._views(asked, failures)
            if any(views):
                self._note(views)
                return
        raise self._nothing_found(failures)

    async def _views(self, nodes: Sequence[Address], failures: list[Exception]) -> list[_View]:
        """Return the views that come in time; add the failures of other nodes to `failures`."""
        waiting = {asyncio.create_task(self._ask_one(at)) for at in nodes}
        views: list[_View] = []
        limit_s = ASK_TIMEOUT_S
        try:
            while waiting:
                done, waiting = await asyncio.wait(
                    waiting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                for task in done:
                    try:
                        views.append(task.result())
                    except Exception as exc:  # noqa: BLE001 - what answers may be no Redis
                        failures.append(exc)
                if any(views):
                    limit_s = OTHERS_WAIT_S
        finally:
            for task in waiting:
                task.cancel()
        return views

    async def _ask_one(self, at: Address) -> _View:
        """Return a node's view. Raises one of FAILURES, or ValueError for an answer that is none."""
        async with asyncio.timeout(ASK_TIMEOUT_S):
            connection = make_connection(self._options(at))
            drop_upon_failures(connection)
            try:
                await connection.connect()
                await connection.send_command("CLUSTER", "SLOTS")
                return [_read_range(words, at) for words in await connection.read_response()]
            finally:
                drop(connection)

    def _options(self, at: Address) -> dict[str, Any]:
        source = self._url.credentials()
        if source is not None:
            source.release()  # the clients of this process hold it

        async def log_in(connection: Any) -> None:
            prepare(connection)
            version = 0 if source is None else source.version
            try:
                await connection.on_connect()
            except redis_errors.RedisError as exc:
                if source is not None and is_about_password(exc):
                    await source.renewed(version)  # for the next attempt
                raise

        return self._url.options() | {
            "host": at[0],
            "port": at[1],
            "socket_timeout": None,
            "socket_connect_timeout": ASK_TIMEOUT_S,
            "health_check_interval": 0,
            "decode_responses": False,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "redis_connect_func": log_in,
        }

    def _note(self, views: Iterable[_View]) -> None:
        """Take the owner of each slot that most views name; keep the known one where none is named."""
        votes: list[Counter[Address]] = []
        # Views agree on most borders of their ranges, so slots are taken in runs between two borders.
        views = list(views)
        borders = sorted(
            {0, *(edge for view in views for first, last, *_ in view for edge in (first, last + 1))}
        )
        runs = list(zip(borders, [*borders[1:], SLOTS_COUNT], strict=True))
        for first, _ in runs:
            votes.append(Counter(at for view in views for low, high, at, _ in view if low <= first <= high))
        with self._lock:
            before = list(self._owners)
            for (first, end), counted in zip(runs, votes, strict=True):
                if not counted:
                    continue
                most = max(counted.values())
                known = before[first]
                keeps = known is not None and counted.get(known, 0) == most
                at = known if keeps else next(at for at, count in counted.items() if count == most)
                self._owners[first:end] = [at] * (end - first)
            now = time.monotonic()
            self._moved_until = {slot: until for slot, until in self._moved_until.items() if until > now}
            for slot in self._moved_until:
                self._owners[slot] = before[slot]
            is_changed = before != self._owners
            self._set_masters()
            self._nodes = dict.fromkeys(at for view in views for *_, nodes in view for at in nodes)
            was_known, self._has_view = self._has_view, True
        if is_changed:
            if was_known:
                logger.info(
                    "the masters of the cluster are now %s", ", ".join(map(show_address, self._masters))
                )
            self._notify()

    def _nothing_found(self, failures: Sequence[Exception]) -> RouteError:
        """Return the error for nodes that tell no view."""
        where = self.address
        refused = next((exc for exc in failures if reply(exc) is not None), None)
        if refused is not None:
            text = reply(refused) or ""
            if "cluster support disabled" in text:
                return RouteError(
                    f"Redis at {where} is no cluster: write redis:// in DYN_REDIS_URL", refused=True
                )
            is_passing = text.startswith(("LOADING", "CLUSTERDOWN", "BUSY"))
            login = self._url.login
            is_passing |= login is not None and login.changes and is_about_password(refused)
            return RouteError(
                f"the cluster {where} refuses to tell its nodes: {text}", refused=not is_passing
            )
        if failures and all(map(is_about_tls, failures)):
            return RouteError(
                f"no node of the cluster answers: {store_error(failures[0], where)}", refused=True
            )
        why = f" ({one_line(failures[0])})" if failures else ""
        return RouteError(f"no node of the cluster {where} answers{why}")


def _read_range(words: Any, asked: Address) -> tuple[int, int, Address, tuple[Address, ...]]:
    """Read one range of an answer to CLUSTER SLOTS. Raises ValueError, TypeError."""
    first, last, *nodes = words
    if not (isinstance(first, int) and isinstance(last, int) and 0 <= first <= last < SLOTS_COUNT and nodes):
        raise ValueError("this is no answer to CLUSTER SLOTS")
    found = tuple((_host(node[0], asked), int(node[1])) for node in nodes)
    return first, last, found[0], found


def _host(name: bytes | None, asked: Address) -> str:
    """Return a node's host. A node that does not know its own is where it was asked."""
    text = (name or b"").decode("utf-8", "replace")
    return asked[0] if text in ("", "?") else text
