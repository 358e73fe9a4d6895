"""A server that answers and refuses writes: its memory is full, it cannot save, or its replica is away.

Reads must go on, also those of a process that is started meanwhile (`serves` and `joining` in the history).
Where memory is full, deletes must, too. No lease ends while its process cannot renew it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from faults.run import Run, Scenario
from faults.scenarios.crashes import KEPT_TTL_S, again_and_again

READS: Final = ("get", "object_get")
DELETES: Final = ("delete", "unregister")


async def fill(run: Run) -> None:
    """Fill the memory, at once or in the middle of the scripts' writes."""
    used_bytes = await run.server.used_bytes()
    limit_bytes = run.rng.choice((1, used_bytes, used_bytes + run.rng.randint(1, 1 << 17)))
    async with run.fault("full", serves=(*READS, *DELETES), limit_bytes=limit_bytes):
        await run.server.execute("CONFIG", "SET", "maxmemory", limit_bytes)
        await run.join("full")
        await run.pause(0.2, 2.0 * run.ttl_s)
        await run.server.execute("CONFIG", "SET", "maxmemory", 0)


async def fail_to_save(run: Run) -> None:
    """Break the server's snapshots. It refuses all writes until it can save (MISCONF)."""
    async with run.fault("cannot save", serves=READS):
        await run.server.break_saving()
        await run.join("cannot save")
        await run.pause(0.2, 2.0 * run.ttl_s)
        await run.server.mend_saving()


async def lose_replica(run: Run) -> None:
    """Freeze or restart the only replica, while the primary demands one for its writes (NOREPLICAS)."""
    replica = run.replica
    assert replica is not None
    async with run.fault("lonely", serves=READS):
        if hangs := run.rng.random() < 0.5:
            replica.freeze()
        else:
            await replica.kill()
        await run.join("lonely")
        await run.pause(0.5, 2.0 * run.ttl_s)
        if hangs:
            replica.thaw()
        else:
            await replica.start()
            await replica.replicate(run.server)
        await run.server.wait_for_info("replication", "min_slaves_good_slaves:1")


async def _lose_replicas(run: Run) -> None:
    await run.server.execute("CONFIG", "SET", "min-replicas-max-lag", 1)
    await run.server.execute("CONFIG", "SET", "min-replicas-to-write", 1)
    await again_and_again(lose_replica)(run)


def _scenario(
    name: str, summary: str, faults: Callable[[Run], Awaitable[None]], *, replica: bool = False
) -> Scenario:
    return Scenario(name, summary, faults, replica=replica, keeps_leases=True, ttl_s=KEPT_TTL_S)


SCENARIOS = (
    _scenario("full", "memory is full (OOM): writes are refused", again_and_again(fill)),
    _scenario(
        "misconf", "it cannot save to disk (MISCONF): writes are refused", again_and_again(fail_to_save)
    ),
    _scenario(
        "lonely",
        "its only replica is away, `min-replicas-to-write 1` (NOREPLICAS): writes are refused",
        _lose_replicas,
        replica=True,
    ),
)
