"""Redis Sentinel replaces a primary by itself, and sentinels are away."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from faults.run import Run, Scenario
from faults.scenarios.crashes import KEPT_TTL_S
from faults.scenarios.others import CHATS
from faults.stores import SentinelStore

BACK_S: Final = 2.0
"""Seconds after which all calls are served again once a new primary is named."""
_DEMOTION_S: Final = 6.0
"""Longest time for which a former primary that is back is left alone, before it is demoted. Sentinel itself
takes some 10 s."""


def _store(run: Run) -> SentinelStore:
    assert isinstance(run.store, SentinelStore), "the scenario is for sentinels only"
    return run.store


async def _kill(run: Run) -> None:
    """Kill the primary (kill -9), once; the sentinels promote the replica."""
    store, old = _store(run), run.server
    await run.pause(0.5, 2.0)
    await run.read_log_to_end(old)
    async with run.fault("sentinel failover", loses="tail", back_s=BACK_S), store.automatic():
        await old.kill()
        await store.wait_for_failover()


async def _live_on(run: Run) -> None:
    """Freeze the primary until the replica was promoted; then it lives on and takes writes, for a time."""
    store, old = _store(run), run.server
    await run.pause(0.5, 2.0)
    await run.read_log_to_end(old)
    async with run.fault("sentinel failover", loses="tail", back_s=BACK_S):
        async with store.automatic():
            old.freeze()
            await store.wait_for_failover()
        old.thaw()
        await old.execute("CLIENT", "UNPAUSE")
        await run.pause(0.5, _DEMOTION_S)
        await run.read_log_to_end(old)
        await old.replicate(run.server)
        await old.execute("CLIENT", "UNPAUSE")


async def _all_away(run: Run) -> None:
    """Kill all sentinels, again and again, and break connections meanwhile: the primary is known."""
    store = _store(run)
    while not run.over:
        await run.pause(0.2, 0.8)
        async with run.fault("sentinels away"):
            for sentinel in store.sentinels.sentinels:
                await sentinel.kill()
            for link in run.some_proxies():
                link.cut()
            await run.pause(0.2, 2.0)
            for sentinel in store.sentinels.sentinels:
                await sentinel.start()


_KILL: Final = Scenario(
    "sentinel-kill",
    "Sentinel: the primary dies, the sentinels promote its replica",
    _kill,
    replica=True,
    keeps_leases=True,
    ttl_s=KEPT_TTL_S,
    stores=("sentinel",),
)
_LIVES_ON: Final = replace(
    _KILL,
    name="sentinel-demoted",
    summary="Sentinel: the primary hangs until it is replaced, and then lives on",
    faults=_live_on,
)

SCENARIOS = (
    _KILL,
    _LIVES_ON,
    replace(
        _KILL,
        name="sentinel-away",
        summary="Sentinel: all sentinels are away, and connections break",
        faults=_all_away,
        replica=False,
    ),
    *(
        replace(
            scenario,
            name=f"chats-{scenario.name}",
            summary=f"chats: {scenario.summary}",
            load=CHATS,
            keeps_leases=False,
        )
        for scenario in (_KILL, _LIVES_ON)
    ),
)
