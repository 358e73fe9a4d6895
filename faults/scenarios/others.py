"""Other loads under the faults that matter to them: locks, objects, chats, and ports and barriers."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from faults.run import Load, Scenario
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


SCENARIOS = (
    *(_with(LOCKS, "locks", name) for name in _OF_LOCKS),
    *(_with(OBJECTS, "objects", name) for name in _OF_OBJECTS),
    *(_with(CHATS, "chats", name) for name in _OF_CHATS),
    *(_with(TENANTS, "exclusive", name) for name in _OF_EXCLUSIVE),
)
