"""A cluster replaces a master by itself, and its slots move while they are used."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from dynamo_redis.store.keys import RegistryKeys
from faults.cluster_store import ClusterStore
from faults.run import PREFIX, Run, Scenario
from faults.scenarios.crashes import KEPT_TTL_S
from faults.scenarios.others import CHATS
from faults.scenarios.sentinels import BACK_S


def _store(run: Run) -> ClusterStore:
    assert isinstance(run.store, ClusterStore), "the scenario is for clusters only"
    return run.store


async def _kill(run: Run) -> None:
    """Kill the master of the registry's slot (kill -9), once; its replica takes over."""
    store, old = _store(run), run.server
    await run.pause(0.5, 2.0)
    await run.read_log_to_end(old)
    async with run.fault("cluster failover", loses="tail", back_s=BACK_S), store.automatic():
        await old.kill()
        await store.wait_for_takeover()


async def _live_on(run: Run) -> None:
    """Freeze the master until its replica took over; then it lives on, and is demoted. Its writes stay held
    back until then, so that the observer misses none."""
    store, old = _store(run), run.server
    await run.pause(0.5, 2.0)
    await run.read_log_to_end(old)
    async with run.fault("cluster failover", loses="tail", back_s=BACK_S), store.automatic():
        old.freeze()
        await store.wait_for_takeover()
        await run.pause(0.0, 1.0)
        old.thaw()
        await old.wait_for_info("replication", "role:slave", "master_link_status:up")
        await old.execute("CLIENT", "UNPAUSE")


async def _move_slots(run: Run) -> None:
    """Move the registry's slot, and in turn the other slots that have keys, from master to master."""
    store = _store(run)
    registry = await store.cluster.slot_of(RegistryKeys(PREFIX).meta)
    while not run.over:
        await run.pause(0.05, 0.4)
        others = await store.used_slots()
        for slot in (registry, *run.rng.sample(others, min(1, len(others)))):
            owner = await store.cluster.owner(slot)
            masters = [node for node in store.cluster.nodes if node.master is None and node is not owner]
            async with run.fault("slot moves", slot=slot):
                await store.move(slot, run.rng.choice(masters))


_KILL: Final = Scenario(
    "cluster-kill",
    "Cluster: the master of the registry dies, its replica takes over",
    _kill,
    replica=True,
    keeps_leases=True,
    ttl_s=KEPT_TTL_S,
    stores=("cluster",),
)
_OTHERS: Final = (
    replace(
        _KILL,
        name="cluster-demoted",
        summary="Cluster: the master of the registry hangs until it is replaced, and then lives on",
        faults=_live_on,
    ),
    replace(
        _KILL,
        name="cluster-slots",
        summary="Cluster: slots move between masters while they are used",
        faults=_move_slots,
    ),
)

SCENARIOS = (
    _KILL,
    *_OTHERS,
    *(
        replace(
            scenario,
            name=f"chats-{scenario.name}",
            summary=f"chats: {scenario.summary}",
            load=CHATS,
            keeps_leases=False,
        )
        for scenario in (_KILL, *_OTHERS)
    ),
)
