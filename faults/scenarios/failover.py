"""Another server takes over, without the last writes and with a clock of its own; and clocks that step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from faults.run import Run, Scenario
from faults.scenarios.crashes import KEPT_TTL_S

HOUR_S: Final = 3600.0
BACK_S: Final = 2.0
"""Seconds after which all calls are served again by the server that new connections reach."""


async def promote(run: Run, offset_s: float) -> None:
    """Part the replica from the primary, which still takes writes; those are lost.

    Then the primary is read to its end by the observer, and killed; connections go to the replica.
    """
    old, links = run.server, run.proxies.values()
    async with run.fault("failover", loses="tail", offset_s=offset_s):
        await run.store.part(offset_s)
        await run.pause(0.1, 1.0)
        run.store.cut_off(links)
        await run.read_log_to_end(old)
        await old.kill()
        await run.pause(0.0, 1.0)
        await run.store.replace(links)
        for link in links:
            link.heal()


async def hand_over(run: Run) -> None:
    """Fail over as planned, behind one address: the old primary lives on, as the replica of the new one.

    Nothing is lost and no connection breaks. New connections reach the new primary a little later; existing
    ones still reach the old one, which refuses their writes.
    """
    async with run.fault("planned failover", back_s=BACK_S):
        await run.store.hand_over()
        await run.pause(0.0, 1.0)
        run.store.lead(run.proxies.values())


async def _hand_over_again_and_again(run: Run) -> None:
    while not run.over:
        await run.pause(0.3, 1.0)
        await hand_over(run)
        await run.pause(2 * BACK_S, 3 * BACK_S)  # long enough to show whether all calls are served again


def _promoting(clock: str) -> Callable[[Run], Awaitable[None]]:
    async def faults(run: Run) -> None:
        await run.pause(0.5, 2.0)
        offset_s = {"equal": 0.0, "ahead": 1.0, "behind": -1.0}[clock] * run.rng.uniform(1.0, HOUR_S)
        await promote(run, offset_s)

    return faults


async def step_clock(run: Run) -> None:
    """Let the server's clock jump by up to an hour, and perhaps back."""
    async with run.fault("clock"):
        offset_s = run.rng.choice((-HOUR_S, HOUR_S, run.rng.uniform(-HOUR_S, HOUR_S)))
        run.server.set_clock(offset_s)
        await asyncio.sleep(0)
        run.recorder.note("stepped", offset_s=offset_s)


async def _step_clocks(run: Run) -> None:
    while not run.over:
        await run.pause(2.0, 3.0)
        await step_clock(run)


SCENARIOS = (
    *(
        Scenario(
            f"failover-{clock}",
            f"a replica without the last writes takes over, its clock {words}",
            _promoting(clock),
            replica=True,
            clock=clock != "equal",
        )
        for clock, words in (
            ("equal", "right"),
            ("ahead", "up to 1 h ahead"),
            ("behind", "up to 1 h behind"),
        )
    ),
    Scenario(
        "failover-planned",
        "a planned failover behind one address: the old primary lives on as a replica",
        _hand_over_again_and_again,
        replica=True,
        keeps_leases=True,
        ttl_s=KEPT_TTL_S,
    ),
    Scenario(
        "clock-steps",
        "the clock jumps by up to 1 h, both ways",
        _step_clocks,
        clock=True,
        keeps_leases=True,
        ttl_s=KEPT_TTL_S,
    ),
)
