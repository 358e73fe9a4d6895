"""`python -m faults.losses`: the number of acknowledged writes that each persistence and replication setting
loses.

Writers put keys into a registry as fast as they can. The server is killed, or a replica that was cut off
takes over. Then the acknowledged puts that are gone are counted. The keys have no owners, which would write
them again. Prints a table and writes `results/losses.json`, the worst of `ROUNDS` for each row.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import uvloop

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import StoreError
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from faults.servers import ServerUnderTest, installed_servers

RESULTS: Final = Path(__file__).parent / "results" / "losses.json"
ROUNDS: Final = 5
WRITERS: Final = 8
CUT_OFF_S: Final = 3.0
_PREFIX: Final = "losses"

Config = dict[str, str]
NO_FILE: Final[Config] = {"appendonly": "no", "save": ""}
BOUNDED: Final[Config] = {"min-replicas-to-write": "1", "min-replicas-max-lag": "1"}


@dataclass(frozen=True, slots=True)
class Loss:
    """The worst round of one setting. `window_s` is the time from the first lost write's answer to the
    last's."""

    setting: str
    fault: str
    acknowledged: int
    lost: int
    window_s: float
    rounds: int = ROUNDS


class Writers:
    """Acknowledged puts, with the time of each answer."""

    def __init__(self, url: str) -> None:
        self._registry = RedisRegistry(
            StoreSettings.load(redis_url=url, prefix=_PREFIX, command_timeout_s=0.5)
        )
        self._tasks: list[asyncio.Task[None]] = []
        self.answered: dict[str, float] = {}

    async def start(self) -> None:
        """Start to write."""
        await self._registry.start()
        self._tasks = [asyncio.create_task(self._write(number)) for number in range(WRITERS)]

    async def _write(self, number: int) -> None:
        count = 0
        while True:
            key = f"{number}/{count}"
            try:
                await self._registry.put(key, b"x" * 200)
            except StoreError:
                await asyncio.sleep(0.01)
                continue
            self.answered[key] = time.monotonic()
            count += 1

    async def stop(self) -> None:
        """Stop to write."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._registry.aclose()


async def _missing(url: str, keys: set[str]) -> set[str]:
    registry = RedisRegistry(StoreSettings.load(redis_url=url, prefix=_PREFIX))
    await registry.start()
    try:
        return keys - {record.key for record in (await registry.get_prefix("")).records}
    finally:
        await registry.aclose()


async def _configure(server: ServerUnderTest, config: Config) -> None:
    for name, value in config.items():
        await server.execute("CONFIG", "SET", name, value)


async def after_kill(directory: Path, config: Config) -> tuple[int, int, float]:
    """Kill the server (kill -9) under writes, restart it with its data on disk, and return the losses."""
    kind = installed_servers()[0]
    none = config.get("appendonly") == "no"
    server = ServerUnderTest("a", kind, directory / "a", persistence="none" if none else "everysec")
    await server.start()
    try:
        await _configure(server, config)
        writers = Writers(server.url)
        await writers.start()
        await asyncio.sleep(3.0)
        killed_at = time.monotonic()
        await server.kill()
        await writers.stop()
        await server.start()
        return await _count(server.url, writers, killed_at)
    finally:
        await server.aclose()


async def after_failover(directory: Path, config: Config) -> tuple[int, int, float]:
    """Cut the replica off for `CUT_OFF_S`, let it take over, and return the losses."""
    kind = installed_servers()[0]
    primary = ServerUnderTest("a", kind, directory / "a")
    replica = ServerUnderTest("b", kind, directory / "b")
    await primary.start()
    await replica.start()
    try:
        await replica.replicate(primary)
        await _configure(primary, config)
        writers = Writers(primary.url)
        await asyncio.sleep(1.5)  # until the replica's first acknowledgement
        await writers.start()
        await asyncio.sleep(1.0)
        replica.freeze()
        await asyncio.sleep(CUT_OFF_S)
        cut_at = time.monotonic()
        await writers.stop()
        await primary.kill()
        replica.thaw()
        await replica.promote()
        return await _count(replica.url, writers, cut_at)
    finally:
        await primary.aclose()
        await replica.aclose()


async def _count(url: str, writers: Writers, fault_at: float) -> tuple[int, int, float]:
    acknowledged = {key: at for key, at in writers.answered.items() if at <= fault_at}
    lost = await _missing(url, set(acknowledged))
    times = [acknowledged[key] for key in lost] or [fault_at]
    return len(acknowledged), len(lost), max(times) - min(times)


Experiment = Callable[[Path, Config], Awaitable[tuple[int, int, float]]]
ROWS: Final[tuple[tuple[str, str, Experiment, Config], ...]] = (
    ("`appendfsync always`", "kill -9", after_kill, {"appendfsync": "always"}),
    ("`appendfsync everysec`", "kill -9", after_kill, {"appendfsync": "everysec"}),
    ("`appendfsync no`", "kill -9", after_kill, {"appendfsync": "no"}),
    ("no file, `save 1 1`", "kill -9", after_kill, {"appendonly": "no", "save": "1 1"}),
    ("no file", "kill -9", after_kill, NO_FILE),
    ("a replica", f"cut off for {CUT_OFF_S:g} s, then promoted", after_failover, {}),
    (
        "a replica, `min-replicas-to-write 1`, `min-replicas-max-lag 1`",
        f"cut off for {CUT_OFF_S:g} s, then promoted",
        after_failover,
        BOUNDED,
    ),
)


async def main() -> None:
    """Measure every row."""
    losses = []
    for setting, fault, experiment, config in ROWS:
        rounds = []
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as directory:
                rounds.append(await experiment(Path(directory), config))
        acknowledged, lost, window_s = max(rounds, key=lambda found: found[1])
        losses.append(Loss(setting, fault, acknowledged, lost, round(window_s, 2)))
        print(losses[-1], flush=True)  # noqa: T201
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([asdict(loss) for loss in losses], indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    uvloop.run(main())
