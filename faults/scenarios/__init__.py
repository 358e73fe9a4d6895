"""All scenarios, by the part that is broken."""

from __future__ import annotations

from typing import Final

from faults.run import Scenario
from faults.scenarios import (
    clients,
    clusters,
    crashes,
    data,
    failover,
    mixed,
    network,
    others,
    refusals,
    sentinels,
)

ALL: Final[dict[str, Scenario]] = {
    scenario.name: scenario
    for scenario in (
        *crashes.SCENARIOS,
        *data.SCENARIOS,
        *network.SCENARIOS,
        *clients.SCENARIOS,
        *failover.SCENARIOS,
        *refusals.SCENARIOS,
        *mixed.SCENARIOS,
        *others.SCENARIOS,
        *sentinels.SCENARIOS,
        *clusters.SCENARIOS,
    )
}
"""Every scenario, by name."""
