"""A simulated deployment on one Redis: its processes, its load, and what Redis says of it."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.harness.processes import Driver, driver
from dynamo_redis.store.redis.client import RedisClient

PREFIX: Final = "bench-scale"

_NUMBER: Final = re.compile(rb"^(\w+):(\d+(?:\.\d+)?)\r?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a deployment."""

    workers: int = 1000
    worker_processes: int = 16
    routers: int = 8
    router_processes: int = 2


FULL: Final = Size()


@dataclass(frozen=True, slots=True)
class ServerCounts:
    """Counts of a server since its start, and its present sizes. Times in seconds, sizes in bytes."""

    at: float
    cpu_s: float
    sent_bytes: float
    memory_bytes: float
    clients: float
    commands: float

    @classmethod
    def read(cls, urls: Sequence[str]) -> ServerCounts:
        """Ask some servers, and return their sums."""

        async def ask(url: str) -> dict[str, float]:
            client = RedisClient(url, timeout_s=10.0)
            try:
                found = _NUMBER.findall(await client.execute("INFO", "everything"))
            finally:
                await client.aclose()
            return {name.decode(): float(value) for name, value in found}

        async def ask_all() -> list[dict[str, float]]:
            return await asyncio.gather(*map(ask, urls))

        at, answers = time.monotonic(), asyncio.run(ask_all())

        def total(name: str, *instead: str) -> float:
            return sum(one[name] if name in one else sum(one[other] for other in instead) for one in answers)

        return cls(
            at,
            total("used_cpu_main_thread", "used_cpu_user", "used_cpu_sys"),
            total("total_net_output_bytes"),
            total("used_memory"),
            total("connected_clients") - len(urls),
            total("total_commands_processed"),
        )

    def cpu_part_since(self, before: ServerCounts) -> float:
        """Return the part of a core that was used since an earlier look, in %."""
        return 100 * (self.cpu_s - before.cpu_s) / (self.at - before.at)


class Deployment:
    """Simulated workers and deaf routers, and one timed router if it is wanted."""

    def __init__(
        self,
        workers: list[Driver],
        routers: list[Driver],
        timed: Driver | None,
        size: Size,
        *,
        listed_count: int,
    ) -> None:
        self._workers = workers
        self._routers = routers
        self.timed = timed
        self.size = size
        self._listed_count = listed_count

    @property
    def processes_count(self) -> int:
        """The processes that it stands for."""
        return self.size.workers + self.size.routers + (self.timed is not None)

    def start(self) -> float:
        """Start all workers at once; return the seconds until all routers list them."""
        began = time.monotonic()
        routers = [*self._routers, *([self.timed] if self.timed else [])]
        for router in routers:
            router.send(f"start {self._listed_count}")
        self._tell(self._workers, "start")
        for router in routers:
            router.answer()
        return time.monotonic() - began

    def run_chats(self, per_s: float) -> None:
        """Begin chats at the workers, and book as many at the routers."""
        self._tell(self._workers, f"chats {per_s / len(self._workers)}")
        routers_count = self.size.routers + (self.timed is not None)
        self._tell([*self._routers, *([self.timed] if self.timed else [])], f"chats {per_s / routers_count}")

    def rest(self) -> None:
        """End all chats."""
        self._tell(self._workers, "rest")
        self._tell([*self._routers, *([self.timed] if self.timed else [])], "chats 0")

    def tell_workers(self, line: str) -> None:
        """Send a line to the processes of the workers."""
        self._tell(self._workers, line)

    def tell(self, line: str, router: Driver) -> None:
        """Send a line to a process of routers."""
        self._tell([router], line)

    def worker_counts(self) -> list[dict[str, Any]]:
        """Return the counts of each process of workers."""
        return self._ask(self._workers)

    def router_counts(self) -> list[dict[str, Any]]:
        """Return the counts of each process of deaf routers."""
        return self._ask(self._routers)

    def timed_counts(self) -> dict[str, Any]:
        """Return the counts of the timed router."""
        assert self.timed is not None
        (found,) = self._ask([self.timed])
        return found

    @staticmethod
    def _ask(drivers: Sequence[Driver]) -> list[dict[str, Any]]:
        for one in drivers:
            one.send("counts")
        return [json.loads(one.answer()) for one in drivers]

    @staticmethod
    def _tell(drivers: Sequence[Driver], line: str) -> None:
        for one in drivers:
            one.send(line)
        for one in drivers:
            one.answer()


@contextmanager
def deployment(
    url: str, size: Size = FULL, *, kind: str = "light", is_timed: bool = False, shards: int = 1
) -> Iterator[Deployment]:
    """Run the processes of a deployment until the block ends. Its workers are not started yet."""
    environment = {"DYN_REDIS_URL": url, "DYN_REDIS_PREFIX": PREFIX, "DYN_EVENT_SHARDS": str(shards)}
    with ExitStack() as stack:

        def run(module: str, *arguments: object) -> Driver:
            words = map(str, arguments)
            module = f"scale.drivers.{module}"
            return stack.enter_context(driver(sys.executable, module, *words, environment=environment))

        routers = [run("routers", count, "deaf") for count in shares(size.routers, size.router_processes)]
        timed = run("routers", 1, "timed") if is_timed else None
        first, workers = 0, []
        for count in shares(size.workers, size.worker_processes):
            workers.append(run("workers", first, count, size.workers, kind))
            first += count
        for one in (*routers, *([timed] if timed else []), *workers):
            one.answer()
        yield Deployment(workers, routers, timed, size, listed_count=0 if kind == "bare" else size.workers)


def shares(count: int, parts: int) -> list[int]:
    """Return a number as sums of whole parts that differ by one at most; parts of 0 are left out."""
    return [size for n in range(parts) if (size := (count + n) // parts)]
