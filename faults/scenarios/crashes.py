"""The server dies, stops, or comes back with less than it had."""

from __future__ import annotations

from faults.run import Loses, Run, Scenario


async def _kill_and_restart(run: Run, loses: Loses | None) -> None:
    while not run.over:
        await run.pause(0.3, 1.5)
        if loses is not None:
            await run.look_all(run.server)
        async with run.fault("kill -9", loses=loses):
            await run.server.kill()
            await run.pause(0.05, 1.5)
            await run.server.start()


async def _restart_everysec(run: Run) -> None:
    await _kill_and_restart(run, "tail")


SCENARIOS = (Scenario("kill-everysec", "kill -9, restart with a file synced each second", _restart_everysec),)
