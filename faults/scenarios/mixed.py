"""All faults, at random."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from faults.run import Run, Scenario
from faults.scenarios.clients import kill_clients, lose_notifications
from faults.scenarios.crashes import freeze, kill, lose_power, wipe
from faults.scenarios.data import delete_lease_keys, delete_structure, flush, trim
from faults.scenarios.failover import promote
from faults.scenarios.network import STRIKES, strike

_SERVER_FAULTS: Final[tuple[Callable[[Run], Awaitable[None]], ...]] = (
    lambda run: kill(run, "tail"),
    lose_power,
    freeze,
    wipe,
    flush,
    delete_structure,
    delete_lease_keys,
    trim,
    kill_clients,
    lose_notifications,
)


async def _everything(run: Run) -> None:
    """Cause network faults and server faults in turn; in the middle, often, a failover."""
    fails_over = run.rng.random() < 0.7
    step = 0
    while not run.over:
        await run.pause(0.1, 0.8)
        step += 1
        if step == 3 and fails_over:
            await promote(run, 0.0)
        elif run.rng.random() < 0.5:
            await strike(run, run.rng.choice(list(STRIKES)))
        else:
            await run.rng.choice(_SERVER_FAULTS)(run)


SCENARIOS = (Scenario("mixed", "everything, at random", _everything, replica=True),)
