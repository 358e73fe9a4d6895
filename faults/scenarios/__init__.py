"""All scenarios, by what is broken."""

from __future__ import annotations

from faults.run import Scenario
from faults.scenarios import crashes

ALL: dict[str, Scenario] = {scenario.name: scenario for scenario in (*crashes.SCENARIOS,)}
