"""One run of a replay through real processes: workers, router replicas with their users, and one Redis.

Faults come when given parts of the requests' time have passed. A `router` is killed (kill -9) and started
again after a second, with its users; their requests under way are lost. `redis` likewise, with its data. A
`worker` is killed and replaced after a second.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Self

from benchmarks.replay.children import Child
from benchmarks.replay.figures import Outcome
from benchmarks.replay.oracle import Difference, difference, read_blocks
from benchmarks.replay.plan import Plan
from dynamo_redis.store.server import EmbeddedServer

Fault = Literal["router", "redis", "worker"]

FAULT_LASTS_S: Final = 1.0

_WORKERS_A_PROCESS: Final = 4
_BEGIN_S: Final = 0.5
_QUIET_S: Final = 30.0
_QUIET_LOOK_S: Final = 0.2

Faults = Sequence[tuple[float, Fault]]
"""Faults in order, each with its time as a part of the time in which requests are due."""

Progress = Callable[[int], None]
"""Called with the count of answered requests."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of a run."""

    outcomes: list[Outcome]
    failed: dict[str, int]
    """Count of requests that ended with an error, by its code; some had their first token before."""
    lost_count: int
    """Count of requests without a first token or an error: their users were killed, or away when they were
    due."""
    length_s: float
    """Real time from the first request to the last answer."""
    events_count: int
    """KV events that the workers published."""
    cpu_s: float
    """CPU seconds of the processes that lived to the end."""
    late_s: float
    """Delay with which requests were sent, real time, 99th percentile."""
    differences: tuple[Difference, ...]
    """Each replica's index against the caches, once there was no more traffic."""
    quiet_s: float
    """Seconds from the last answer until all indexes were equal to the caches, or until the wait was given
    up."""


class Deployment:
    """The processes of one run. Use it as an async context manager."""

    def __init__(self, plan: Plan, server: EmbeddedServer, *, faults: Faults = ()) -> None:
        self.plan = replace(plan, redis_url=server.url, prefix=f"replay-{secrets.token_hex(4)}")
        self.server = server
        self.workers: list[Child] = []
        self.routers: list[Child] = []
        self.reports: dict[int, dict[str, Any]] = {}
        """The last progress report of each replica."""
        self._answered_before = 0  # by replicas that were killed
        self._faults = faults
        self._closing = AsyncExitStack()
        self._directory = Path()

    async def __aenter__(self) -> Self:
        try:
            self._directory = Path(self._closing.enter_context(tempfile.TemporaryDirectory()))
            self._closing.push_async_callback(self._end)
            counts = worker_counts(
                self.plan.workers, alone=any(fault == "worker" for _, fault in self._faults)
            )
            self.workers += await asyncio.gather(*map(self._start_workers, counts))
            self.routers += await asyncio.gather(*map(self._start_router, range(self.plan.replicas)))
        except BaseException:
            await self._closing.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._closing.aclose()

    async def _end(self) -> None:
        await asyncio.gather(*(child.aclose() for child in self.routers))
        await asyncio.gather(*(child.aclose() for child in self.workers))

    async def _start_workers(self, count: int) -> Child:
        return await _ready(await Child.start("replay.worker", self.plan.to_json(), str(count)))

    async def _start_router(self, replica: int) -> Child:
        path = self._directory / f"outcomes-{replica}"
        return await _ready(await Child.start("replay.router", self.plan.to_json(), str(replica), str(path)))

    # ----------------------------------------------------------------- the requests

    async def replay(self, progress: Progress) -> RunResult:
        """Send all requests, and compare everything afterwards."""
        trace = self.plan.load_trace()
        begin = time.monotonic() + _BEGIN_S
        cpu_s = self._cpu_s()
        late_s = await self._drive(begin, trace.requests[-1].arrival_s / self.plan.speedup, progress)
        length_s = time.monotonic() - begin
        cpu_s = self._cpu_s() - cpu_s
        differences, quiet_s = await self._compare()
        outcomes, failed = self._recorded()
        known = {outcome.index for outcome in outcomes} | failed.keys()
        return RunResult(
            outcomes=outcomes,
            failed=dict(Counter(failed.values())),
            lost_count=len(trace.requests) - len(known),
            length_s=length_s,
            events_count=await self.events_count(),
            cpu_s=cpu_s,
            late_s=late_s,
            differences=differences,
            quiet_s=quiet_s,
        )

    async def _drive(self, begin: float, due_s: float, progress: Progress) -> float:
        """Let the users send, cause the faults, and wait for all answers. Returns the delay with which
        requests were sent, in seconds."""
        following = [
            asyncio.create_task(self._follow(replica, begin, progress))
            for replica in range(self.plan.replicas)
        ]
        try:
            for part, fault in self._faults:
                await asyncio.sleep(begin + part * due_s - time.monotonic())
                if fault == "router":
                    following[0].cancel()
                    await asyncio.wait([following[0]])
                    self._answered_before += self.reports.pop(0, {}).get("answered", 0)
                await self._break(fault)
                if fault == "router":
                    following[0] = asyncio.create_task(self._follow(0, begin, progress))
            reports = await asyncio.gather(*following)
        finally:
            for task in following:
                task.cancel()
        return max(float(report["late_s"]) for report in reports)

    async def _follow(self, replica: int, begin: float, progress: Progress) -> dict[str, Any]:
        child = self.routers[replica]
        child.send("go", begin)
        while True:
            report = self.reports[replica] = await child.answer(None)
            progress(self._answered_before + sum(one["answered"] for one in self.reports.values()))
            if report["finished"]:
                return report

    def _recorded(self) -> tuple[list[Outcome], dict[int, str]]:
        """Return the outcomes of requests, and the error codes of those that failed, by their index."""
        outcomes: list[Outcome] = []
        failed: dict[int, str] = {}
        for path in self._directory.glob("outcomes-*"):
            for line in path.read_text().splitlines():
                fields = json.loads(line)
                if "failed" in fields:
                    failed[fields["index"]] = fields["failed"]
                else:
                    outcomes.append(Outcome(**fields))
        return outcomes, failed

    def _cpu_s(self) -> float:
        return sum(child.cpu_s() for child in (*self.workers, *self.routers))

    # ----------------------------------------------------------------- faults

    async def _break(self, fault: Fault) -> None:
        match fault:
            case "redis":
                await self.server.kill()
                await asyncio.sleep(FAULT_LASTS_S)
                await self.server.start()
            case "worker":
                await self.workers[0].kill()
                await asyncio.sleep(FAULT_LASTS_S)
                self.workers[0] = await self._start_workers(1)
            case "router":
                await self.routers[0].kill()
                await asyncio.sleep(FAULT_LASTS_S)
                self.routers[0] = await self._start_router(0)

    # ----------------------------------------------------------------- the truth

    async def events_count(self) -> int:
        """Return the count of KV events that the workers have published."""
        with self._written("truth") as directory:
            answers = [await worker.answer_to("truth", directory) for worker in self.workers]
        return sum(int(one["events"]) for one in answers)

    async def _compare(self) -> tuple[tuple[Difference, ...], float]:
        """Compare each index with the caches until all are equal or the time is over. Returns the
        differences, and the seconds it took."""
        if self.plan.mode != "kv":
            return (), 0.0
        began = time.monotonic()
        while True:
            found = await self.differences()
            taken_s = time.monotonic() - began
            if all(one.equal for one in found) or taken_s > _QUIET_S:
                return found, taken_s
            await asyncio.sleep(_QUIET_LOOK_S)

    async def differences(self) -> tuple[Difference, ...]:
        """Return the difference of each router's index from the caches at this moment."""
        with self._written("truth") as directory:
            for worker in self.workers:
                await worker.answer_to("truth", directory)
            truth = read_blocks(directory)
        found: list[Difference] = []
        for router in self.routers:
            with self._written("index") as directory:
                await router.answer_to("index", directory)
                found.append(difference(read_blocks(directory), truth))
        return tuple(found)

    @contextmanager
    def _written(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=name, dir=self._directory) as directory:
            yield Path(directory)


async def _ready(child: Child) -> Child:
    try:
        await child.answer()
    except BaseException:
        await child.kill()
        raise
    return child


def worker_counts(workers: int, *, alone: bool) -> Sequence[int]:
    """Return the number of workers of each process; with `alone` the first is in a process of its own."""
    counts = [1] if alone else []
    left = workers - len(counts)
    while left > 0:
        counts.append(min(left, _WORKERS_A_PROCESS))
        left -= counts[-1]
    return counts


async def run(
    plan: Plan, server: EmbeddedServer, *, faults: Faults = (), progress: Progress = lambda _: None
) -> RunResult:
    """Start everything, replay, compare, end everything."""
    async with Deployment(plan, server, faults=faults) as deployment:
        return await deployment.replay(progress)
