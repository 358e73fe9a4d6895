"""H1 and H2: the primary of a Redis Sentinel deployment is killed (kill -9) under load.

Each round has servers, sentinels and a deployment of its own (a frontend with kv routing and two workers, as
`up` starts them). Chats come at a fixed pace; four owners keep keys and register more of them, one after the
other; a writer puts a key, again and again; a watch follows all keys.

H1  A sentinel is asked each 5 ms which primary it names. The figure is the time from its first answer with
    the new one to the first write that is acknowledged after the kill.
H2  A chat fails by any status but 200, by a broken connection, or after 30 s. When all has calmed down, the
    registry is compared with what must be there: the keys of the deployment before the kill, and those whose
    registration was acknowledged. The second figure counts missing, extra and phantom keys; phantom ones are
    those that the watch shows otherwise than the registry.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import uvloop

from benchmarks.ha.load import (
    CHATS,
    CHATS_PER_S,
    KILL_AFTER_S,
    OWNERS,
    PREFIX,
    READY_S,
    Keys,
    first_write,
    registry,
)
from benchmarks.harness.chats import CountedChats, first_model
from benchmarks.harness.processes import up
from benchmarks.harness.report import Measured
from dynamo_redis.store.sentinel_server import SentinelDeployment


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures of one round."""

    writable_s: float
    detected_s: float
    failed_chats: int
    missing: int
    extra: int
    phantom: int


def sentinel_kills(rounds: int) -> dict[str, Measured]:
    """Measure H1 and H2: the worst of all rounds."""
    outcomes = []
    for seed in range(1, rounds + 1):
        outcomes.append(found := uvloop.run(_round(random.Random(seed))))
        print(
            f"H1 H2 round {seed}: new primary named after {found.detected_s:.2f} s, writable"
            f" {found.writable_s:.3f} s later; {found.failed_chats} of {CHATS} chats failed; keys missing"
            f" {found.missing}, extra {found.extra}, phantom {found.phantom}",
            flush=True,
        )
    writable_s = float(f"{max(one.writable_s for one in outcomes):.3g}")
    failed_chats = float(max(one.failed_chats for one in outcomes))
    wrong_keys = float(max(one.missing + one.extra + one.phantom for one in outcomes))
    return {
        "H1": Measured(writable_s, None, None, rounds),
        "H2": Measured([failed_chats, wrong_keys], None, None, rounds),
    }


async def _round(rng: random.Random) -> Outcome:
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        servers = await stack.enter_async_context(SentinelDeployment(Path(directory) / "servers"))
        options = ("--redis-url", servers.url, "--redis-prefix", PREFIX, "--speedup-ratio", "0")
        url = stack.enter_context(up(*options))
        chats = CountedChats(url, await asyncio.to_thread(first_model, url, READY_S), "H2")
        stack.callback(chats.close)
        owners = [await stack.enter_async_context(registry(servers.url)) for _ in range(OWNERS)]
        keys = Keys(owners)
        await keys.register_first()
        flow = asyncio.create_task(chats.flow(CHATS, CHATS_PER_S))
        registering = asyncio.create_task(keys.register_on())
        await asyncio.sleep(rng.uniform(*KILL_AFTER_S))
        await keys.note_others()
        old = await servers.primary()
        await old.kill()
        killed_at = time.monotonic()
        writing = asyncio.create_task(first_write(owners[0]))
        _, detected_at = await servers.wait_for_primary(other_than=old, poll_s=0.005)
        written_at = await writing
        failed_chats = await flow
        keys.stop()
        await registering
        missing, extra, phantom = await keys.compare()
        await keys.aclose()
        return Outcome(
            max(0.0, written_at - detected_at), detected_at - killed_at, failed_chats, missing, extra, phantom
        )
