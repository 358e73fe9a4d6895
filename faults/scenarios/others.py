"""Other loads under the faults that matter to them: locks, objects, chats, and ports and barriers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from dynamo_redis.config import StoreSettings
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from faults.roles.engine import ENDPOINT
from faults.run import PREFIX, Load, Run, Scenario
from faults.scenarios import crashes, data, failover, mixed, network, refusals

LOCKS: Final = Load({"locker": 4}, {"locker": ("freeze", "freeze", "kill")})
CHATS: Final = Load({"engine": 2, "frontend": 1})
TENANTS: Final = Load({"tenant": 4}, {"tenant": ("freeze", "kill", "freeze")})
OBJECTS: Final = Load({"uploader": 3, "reader": 2}, {"uploader": ("kill", "freeze"), "reader": ("freeze",)})

_FAULTS: Final = {
    scenario.name: scenario
    for scenario in (
        *crashes.SCENARIOS,
        *data.SCENARIOS,
        *network.SCENARIOS,
        *failover.SCENARIOS,
        *refusals.SCENARIOS,
        *mixed.SCENARIOS,
    )
}
_OF_LOCKS: Final = (
    "kill-always",
    "kill-everysec",
    "freeze",
    "flushall",
    "drop-answers",
    "stall",
    "cut",
    "failover-equal",
    "failover-behind",
    "failover-planned",
    "clock-steps",
    "mixed",
)
_OF_OBJECTS: Final = (
    "kill-always",
    "power",
    "freeze",
    "drop-answers",
    "half-close",
    "slow",
    "cut",
    "failover-equal",
    "failover-planned",
    "full",
    "mixed",
)
_OF_CHATS: Final = (
    "kill-everysec",
    "freeze",
    "wipe",
    "flushall",
    "structures",
    "black-hole",
    "drop-answers",
    "cut",
    "pause",
    "failover-behind",
    "failover-planned",
    "full",
    "misconf",
    "lonely",
    "mixed",
)
_OF_EXCLUSIVE: Final = (
    "kill-always",
    "kill-everysec",
    "power",
    "freeze",
    "wipe",
    "flushall",
    "drop-answers",
    "black-hole",
    "cut",
    "failover-equal",
    "failover-behind",
    "clock-steps",
    "mixed",
)


def _with(load: Load, kind: str, name: str) -> Scenario:
    scenario = _FAULTS[name]
    summary = f"{kind}: {scenario.summary}"
    return replace(scenario, name=f"{kind}-{name}", summary=summary, load=load, keeps_leases=False)


_DEEP: Final = "[" * 100_000 + "]" * 100_000
_RECORD: Final = (
    '{{"version": {version}, "type": "Endpoint", "namespace": "dynamo", "component": "backend", '
    '"endpoint": "generate", "instance_id": {instance_id}, "transport": {transport}, "x": {x}}}'
)
_FIELDS: Final = {"version": "1", "instance_id": "5", "transport": '{"tcp": "127.0.0.1:1/x"}', "x": "0"}
_BAD_RECORDS: Final = (
    b"\xff\xfe",
    b'["a list"]',
    *(
        _RECORD.format(**_FIELDS | wrong).encode()
        for wrong in (
            {"version": "1e999"},
            {"instance_id": "1e999"},
            {"instance_id": "9" * 5_000},
            {"instance_id": "99"},  # differs from the id in its key
            {"transport": '["x"]'},
            {"x": _DEEP},
        )
    ),
)
_RECORDS_OF: Final = ("v1/instances/", "v1/mdc/", "v1/kv_routers/")


async def _litter_records(run: Run) -> None:
    """Put unreadable records of instances, models and routers, and remove them after a while."""
    async with _registry(run) as registry:
        while not run.over:
            await run.pause(0.05, 0.3)
            key = f"{run.rng.choice(_RECORDS_OF)}{ENDPOINT.replace('.', '/')}/5"
            async with run.fault("bad record", key=key):
                await registry.put(key, run.rng.choice(_BAD_RECORDS))
                await run.join("bad record", "engine", "frontend")
                await run.pause(0.1, 0.6)
                await registry.delete(key)


@asynccontextmanager
async def _registry(run: Run) -> AsyncIterator[RedisRegistry]:
    registry = RedisRegistry(StoreSettings.load(redis_url=run.server.url, prefix=PREFIX))
    await registry.start()
    try:
        yield registry
    finally:
        await registry.aclose()


async def _kill_half(run: Run) -> None:
    """Kill half of the workers at once (kill -9); others take their chats over."""
    await run.pause(1.0, 2.0)
    engines = [process for process in run.processes if process.orders.role == "engine"]
    doomed = run.rng.sample(engines, len(engines) // 2)
    async with run.fault("half of the workers die"):
        await asyncio.gather(*(process.kill() for process in doomed))


SCENARIOS = (
    *(_with(LOCKS, "locks", name) for name in _OF_LOCKS),
    *(_with(OBJECTS, "objects", name) for name in _OF_OBJECTS),
    *(_with(CHATS, "chats", name) for name in _OF_CHATS),
    *(_with(TENANTS, "exclusive", name) for name in _OF_EXCLUSIVE),
    Scenario(
        "chats-records",
        "chats: records of instances, models and routers that cannot be read",
        _litter_records,
        load=CHATS,
    ),
    Scenario(
        "chats-rubbish",
        "chats: a foreign writer of rubbish into every key of the prefix",
        crashes.again_and_again(data.litter_everywhere, 0.1, 0.6),
        load=CHATS,
    ),
    Scenario(
        "chats-half",
        "chats: half of the workers are killed at once (kill -9)",
        _kill_half,
        load=Load({"engine": 4, "frontend": 2}),
    ),
)
