"""One run: a server, load processes with a proxy each, faults for a while, then peace; all in a history.

    start servers, observer, proxies, load
    the scenario's faults, and beside them the workers' own (killed, frozen, hanging), until the time is over
    heal everything; tell the load to rest; wait, bounded, until all agree
    write the server's state down; end everything

The result is a directory: `*.jsonl` histories (`faults.history`), `*.log` of each process, the servers'
directories. Another program judges it (`faults.judge`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from dynamo_redis.errors import StoreError
from faults.cluster_store import ClusterStore
from faults.history import Recorder
from faults.observer import Observer
from faults.processes import LoadProcess, end_all
from faults.proxy import Link
from faults.roles.base import Orders
from faults.run_state import RunState
from faults.servers import (
    Persistence,
    ServerKind,
    ServerUnderTest,
    faketime_library,
    final_state,
    wait_until_answers,
)
from faults.stores import PlainStore, SentinelStore, Store, StoreName

PREFIX: Final = "faults"
TTL_S: Final = 2.0
START_TIMEOUT_S: Final = 60.0
QUIET_TIMEOUT_S: Final = 25.0
QUIET_S: Final = 1.2
"""Seconds for which everything must agree, and nothing change."""

JOIN_TIMEOUT_S: Final = 30.0
"""Longest wait in seconds for a process that is started while a fault lasts."""

_SIGN_OF_LIFE: Final = {"watcher": "watch", "frontend": "started", "engine": "started"}
"""By role: the note that shows that a process which was started late is served."""

Loses = Literal["data", "tail", "log"]
"""The acknowledged data that a fault may destroy: all, the last writes, or only the change log's past."""

How = Literal["kill", "freeze", "hang"]
"""The ways to break a process: kill -9; SIGSTOP beyond its TTL, then SIGCONT; a blocked event loop."""


@dataclass(frozen=True, slots=True)
class Load:
    """The count of processes of each role, and the ways in which some of them are broken, once each."""

    roles: Mapping[str, int]
    breaks: Mapping[str, Sequence[How]] = field(default_factory=dict)


REGISTRY: Final = Load(
    {"writer": 1, "worker": 3, "watcher": 2},
    {"worker": ("kill", "freeze", "hang")},
)


class Skipped(Exception):
    """This run cannot be made here; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A kind of fault, with the load that it applies to.

    `faults` is called once, with the run, and returns when `run.over`. `keeps_leases`: they may not cost a
    working process its lease.
    """

    name: str
    summary: str
    faults: Callable[[Run], Awaitable[None]]
    persistence: Persistence = "everysec"
    clock: bool = False
    replica: bool = False
    load: Load = REGISTRY
    keeps_leases: bool = False
    ttl_s: float = TTL_S
    stores: tuple[StoreName, ...] = ("plain", "sentinel", "cluster")


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a run.

    `recovery_s`: from the end of the last fault (or of the last action on a process) until every process was
    served again and all agreed; None if that never came.
    """

    calls: int
    unknown: int
    watch_batches: int
    log_entries: int
    resyncs: int
    lease_losses: int
    recovery_s: float | None


class Run:
    """One run of a scenario. Scenarios use the public methods; `perform` carries out the run.

    Raises Skipped, also later, for parts that this machine lacks.

    Args:
        scenario: The faults, and the load.
        kind: Server program.
        seed: Fixes the faults and their times.
        directory: Directory of the histories, logs and server data; it must not exist.
        load_s: Seconds of faults.
        store: How the processes reach their servers.
    """

    def __init__(
        self,
        scenario: Scenario,
        kind: ServerKind,
        seed: int,
        directory: Path,
        *,
        load_s: float,
        store: StoreName = "plain",
    ) -> None:
        if scenario.clock and faketime_library() is None:
            raise Skipped("libfaketime is not installed (Debian: apt install faketime)")
        if scenario.clock and store == "cluster":
            raise Skipped("the clocks of a cluster's nodes are not shifted")
        self.scenario = scenario
        self.kind = kind
        self.directory = directory
        self.rng = random.Random(f"{scenario.name} {seed}")
        self.seed = seed
        self.proxies: dict[str, Link] = {}
        self.processes: list[LoadProcess] = []
        directory.mkdir(parents=True)
        self.recorder = Recorder(directory, "runner")
        self._observed = Recorder(directory, "observer")
        self.observer = Observer(self._observed, PREFIX)
        self.store_name = store
        self.store = self._make_store()
        self._load_s = load_s
        self._joined: set[str] = set()
        self._ends_at = float("inf")
        self._healed_at = 0.0
        self._run_state = RunState(directory)

    def _make_store(self) -> Store:
        if self.store_name == "cluster":
            return ClusterStore(self.kind, self.directory / "nodes", self.scenario.persistence, PREFIX)
        servers = [self._server(label) for label in ("a", "b")[: 1 + self.scenario.replica]]
        if self.store_name == "sentinel":
            return SentinelStore(servers, self.directory / "sentinels")
        return PlainStore(servers)

    def _server(self, label: str) -> ServerUnderTest:
        directory, scenario = self.directory / f"server-{label}", self.scenario
        return ServerUnderTest(
            label, self.kind, directory, persistence=scenario.persistence, clock=scenario.clock
        )

    # ------------------------------------------------------------------ for scenarios

    @property
    def server(self) -> ServerUnderTest:
        """The primary."""
        return self.store.server

    @property
    def replica(self) -> ServerUnderTest | None:
        """The other server, if there is one."""
        return self.store.replica

    @property
    def ttl_s(self) -> float:
        """The TTL of leases and locks, in seconds."""
        return self.scenario.ttl_s

    @property
    def over(self) -> bool:
        """True if the time for faults has passed."""
        return time.monotonic() >= self._ends_at

    async def pause(self, least_s: float, most_s: float) -> None:
        """Wait for a random time."""
        await asyncio.sleep(self.rng.uniform(least_s, most_s))

    @contextlib.asynccontextmanager
    async def fault(self, name: str, *, loses: Loses | None = None, **arguments: Any) -> AsyncIterator[None]:
        """Note the beginning and the end of a fault, and the data that it may destroy."""
        self.recorder.note("fault", name=name, **arguments)
        if loses is not None:
            self.recorder.note("loses", what=loses)
        try:
            yield
        finally:
            self.recorder.note("healed", name=name)
            self._healed_at = time.monotonic()

    async def read_log_to_end(self, server: ServerUnderTest) -> None:
        """Hold back writes on a server that is about to lose data, and read its log to the end.

        A cluster's node may need a moment after its last start. Raises StoreError if it needs too long.
        """
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while True:
            try:
                await server.pause_writes()
                await self.observer.catch_up(server)
            except StoreError:
                if self.store_name != "cluster" or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)
            else:
                return

    def some_proxies(self) -> list[Link]:
        """Return a random, non-empty part of the processes' proxies; often all of them."""
        proxies = list(self.proxies.values())
        if self.rng.random() < 0.4:
            return proxies
        return self.rng.sample(proxies, self.rng.randint(1, len(proxies)))

    async def join(self, fault: str, *roles: str) -> None:
        """Start one more process of each role while a fault lasts, at the first call. Wait until it has what
        it needs of the server: a watch's first batch, a chat. The wait is bounded, as the oracles judge.

        Without roles: a watcher or a frontend, whichever the load has.
        """
        wanted = roles or [role for role in ("watcher", "frontend") if role in self.scenario.load.roles]
        joining = {f"{role}-new": role for role in wanted if role not in self._joined}
        self._joined.update(wanted)
        for name, role in joining.items():
            self.recorder.note("joining", process=name, fault=fault, sign=_SIGN_OF_LIFE[role])
            await self.start_process(role, name)
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while not all(map(self._is_served, joining)) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    def _is_served(self, newcomer: str) -> bool:
        sign = _SIGN_OF_LIFE[newcomer.removesuffix("-new")]
        return f'"note": "{sign}"'.encode() in _content(self.directory / f"{newcomer}.jsonl")

    # ------------------------------------------------------------------ performing it

    async def perform(self) -> Figures:
        """Carry out the run. Raises Skipped, and StoreError when a server cannot be started at all."""
        try:
            await self._start()
            await self._disturb()
            return await self._settle()
        finally:
            await self._end()

    async def _start(self) -> None:
        await self.store.start()
        for server in self.store.servers:
            self.observer.follow(server)
        if self.scenario.clock and abs(await self._shift(60.0) - 60.0) > 5.0:
            raise Skipped(f"libfaketime does not move the clock of {self.kind.name}")
        self.recorder.note(
            "began",
            scenario=self.scenario.name,
            seed=self.seed,
            server=self.kind.name,
            store=self.store_name,
            ttl_s=self.ttl_s,
            keeps_leases=self.scenario.keeps_leases,
        )
        for role, count in self.scenario.load.roles.items():
            for number in range(1, count + 1):
                await self.start_process(role, f"{role}-{number}")
        await self._wait_until_started()

    async def _shift(self, offset_s: float) -> float:
        """Try the shifted clock; it is right again afterwards."""
        self.server.set_clock(offset_s)
        found = await self.server.clock_offset_s()
        self.server.set_clock(0.0)
        return found

    async def start_process(self, role: str, name: str) -> None:
        """Start one more load process, behind a proxy of its own."""
        proxy = await self.store.open_link()
        self.proxies[name] = proxy
        orders = Orders(
            role,
            name,
            self.directory,
            proxy.url,
            PREFIX,
            f"{self.scenario.name} {self.seed}",
            ttl_s=self.ttl_s,
        )
        self.processes.append(LoadProcess.start(orders, self.recorder))

    async def _wait_until_started(self) -> None:
        """Wait until each process has written a line; faults before that would only keep it from starting."""
        names = [process.name for process in self.processes]
        async with asyncio.timeout(START_TIMEOUT_S):
            while any(b'"started"' not in _content(self.directory / f"{name}.jsonl") for name in names):
                await asyncio.sleep(0.05)

    async def _disturb(self) -> None:
        await asyncio.sleep(0.5)
        self._ends_at = time.monotonic() + self._load_s
        self._healed_at = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._perform_faults())
            for role, hows in self.scenario.load.breaks.items():
                group.create_task(self._break(role, hows))
        await asyncio.sleep(max(0.0, self._ends_at - time.monotonic()))

    async def _perform_faults(self) -> None:
        await self.scenario.faults(self)

    async def _break(self, role: str, hows: Sequence[How]) -> None:
        """Break processes of a role, one each way, in random order, at random times."""
        rng = random.Random(f"{role} {self.scenario.name} {self.seed}")
        processes = [process for process in self.processes if process.orders.role == role]
        rng.shuffle(processes)
        latest_s = max(0.5, self._load_s - 2 * self.ttl_s)

        async def break_one(process: LoadProcess, how: How) -> None:
            await asyncio.sleep(rng.uniform(0, latest_s))
            match how:
                case "kill":
                    await process.kill()
                case "freeze":
                    process.freeze()
                    await asyncio.sleep(self.ttl_s * rng.uniform(1.2, 2.0))
                    process.thaw()
                case "hang":
                    process.hang()
            self._healed_at = time.monotonic()

        await asyncio.gather(*map(break_one, processes, hows))

    # ------------------------------------------------------------------ peace

    async def _settle(self) -> Figures:
        for proxy in self.proxies.values():
            proxy.heal()
        self.server.thaw()
        await wait_until_answers(self.server)
        for process in self.processes:
            process.thaw()
        self._healed_at = max(self._healed_at, self._ends_at)
        served_s = await self._wait_until_served()
        for process in self.processes:
            if process.alive:
                process.rest()
        self.recorder.note("rest")
        agreed_s = None if served_s is None else await self._wait_until_quiet()
        recovery_s = None if served_s is None or agreed_s is None else max(served_s, agreed_s)
        self.recorder.note("quiet", seconds=recovery_s)
        await self.observer.catch_up(self.server)
        state = await final_state(self.server, PREFIX)
        if state["revision"] is not None:  # this load uses a registry
            self.recorder.note("state", server=self.server.label, **state)
        for process in self.processes:
            if process.alive:
                self.recorder.note("alive", process=process.name)
        run_state = self._run_state
        run_state.read()
        return Figures(
            run_state.call_count,
            run_state.unknown_count,
            run_state.batch_count,
            self.observer.entry_count,
            run_state.resync_count,
            run_state.lease_loss_count,
            recovery_s,
        )

    async def _wait_until_served(self) -> float | None:
        """Return the seconds from the last heal until each process that lives, and makes calls, has had an
        answer to a call that it began after it; None if one never had."""
        deadline = time.monotonic() + QUIET_TIMEOUT_S
        waiting: list[str] = []
        while time.monotonic() < deadline:
            self._run_state.read()
            waiting = [
                process.name
                for process in self.processes
                if process.alive and self._run_state.served_at(process.name) < self._healed_at
            ]
            if not waiting:
                return time.monotonic() - self._healed_at
            await asyncio.sleep(0.05)
        self.recorder.note("restless", why=f"no call of {', '.join(waiting)} was answered after the faults")
        return None

    async def _wait_until_quiet(self) -> float | None:
        """Return the seconds from the last heal until everything agreed, and went on agreeing; None if it
        never did."""
        deadline = time.monotonic() + QUIET_TIMEOUT_S
        agreed_at, agreed_on, why = 0.0, None, "no history was read"
        while time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            try:
                state = await final_state(self.server, PREFIX)
            except StoreError as exc:
                agreed_on, why = None, str(exc)
                continue
            self._run_state.read()
            alive = {process.name for process in self.processes if process.alive}
            found = self._run_state.disagreement(state["records"], alive)
            if found is not None:
                agreed_on, why = None, found
            elif agreed_on != state["revision"]:
                agreed_at, agreed_on = time.monotonic(), state["revision"]
            elif time.monotonic() - agreed_at >= QUIET_S:
                return max(0.0, agreed_at - self._healed_at)
        self.recorder.note("restless", why=why)
        return None

    async def _end(self) -> None:
        await self.observer.aclose()
        await end_all(self.processes)
        for proxy in self.proxies.values():
            await proxy.aclose()
        await self.store.aclose()
        self._observed.close()
        self.recorder.close()


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
