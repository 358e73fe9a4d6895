"""The server dies, does not answer, or comes back with less data than it had."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from faults.run import Loses, Run, Scenario
from faults.servers import wait_until_answers

KEPT_TTL_S: Final = 4.0
"""The TTL where no lease may be lost. Leases age by up to 1 s when a server comes back or its clock jumps
ahead. Of a TTL of 2 s, half of which may have passed before it is renewed, that leaves nothing."""


async def kill(run: Run, loses: Loses | None) -> None:
    """Kill the server (kill -9), and restart it after a while. The data that may be lost is read first, while
    writes are held back."""
    if loses is not None:
        await run.read_log_to_end(run.server)
    async with run.fault("kill -9", loses=loses):
        await run.server.kill()
        await run.pause(0.05, 1.5)
        await run.server.start()


async def lose_power(run: Run) -> None:
    """Let the host die: the writes that were not synced to disk are gone."""
    synced_bytes = run.server.log_file_bytes()
    await run.pause(0.2, 1.0)
    await run.read_log_to_end(run.server)
    async with run.fault("power", loses="tail"):
        await run.server.kill()
        size_bytes = run.server.log_file_bytes()
        kept_bytes = run.rng.randint(min(synced_bytes, size_bytes), size_bytes)
        run.server.truncate_log_file(kept_bytes)
        run.recorder.note("truncated", lost_bytes=size_bytes - kept_bytes)
        await run.pause(0.05, 1.0)
        await run.server.start()


async def freeze(run: Run) -> None:
    """Stop the server (SIGSTOP), sometimes for longer than a TTL."""
    async with run.fault("freeze"):
        run.server.freeze()
        await run.pause(0.2, 2.0 * run.ttl_s)
        run.server.thaw()


async def pause_clients(run: Run) -> None:
    """Hold back all commands, or all writes, by CLIENT PAUSE. Nothing else lifts a pause of all commands."""
    kind = run.rng.choice(("ALL", "WRITE"))
    pause_s = run.rng.uniform(0.2, 2.0 * run.ttl_s)
    async with run.fault("CLIENT PAUSE", kind=kind):
        await run.server.execute("CLIENT", "PAUSE", round(pause_s * 1000), kind)
        await asyncio.sleep(pause_s)
        await wait_until_answers(run.server)


async def wipe(run: Run) -> None:
    """Restart the server without its data."""
    await run.read_log_to_end(run.server)
    async with run.fault("wipe", loses="data"):
        await run.server.kill()
        run.server.wipe()
        await run.pause(0.05, 1.0)
        await run.server.start()


def again_and_again(
    fault: Callable[[Run], Awaitable[None]], least_s: float = 0.3, most_s: float = 1.5
) -> Callable[[Run], Awaitable[None]]:
    """Return scenarios' faults that repeat `fault`, after pauses of random length, until the run is over; at
    least once."""

    async def faults(run: Run) -> None:
        while True:
            await run.pause(least_s, most_s)
            await fault(run)
            if run.over:
                return

    return faults


SCENARIOS = (
    Scenario(
        "kill-always",
        "kill -9 and restart, its file synced before each answer",
        again_and_again(lambda run: kill(run, None)),
        persistence="always",
        keeps_leases=True,
        ttl_s=KEPT_TTL_S,
    ),
    Scenario(
        "kill-everysec",
        "kill -9 and restart, its file synced each second",
        again_and_again(lambda run: kill(run, "tail")),
    ),
    Scenario(
        "kill-none",
        "kill -9 and restart, without a file: all data lost",
        again_and_again(lambda run: kill(run, "data")),
        persistence="none",
    ),
    Scenario(
        "power",
        "the host loses power: the unsynced end of its file is gone",
        again_and_again(lose_power),
    ),
    Scenario(
        "freeze",
        "SIGSTOP, for up to two TTLs",
        again_and_again(freeze),
        keeps_leases=True,
        ttl_s=KEPT_TTL_S,
    ),
    Scenario(
        "pause",
        "CLIENT PAUSE of all commands or of writes, for up to two TTLs",
        again_and_again(pause_clients),
        keeps_leases=True,
        ttl_s=KEPT_TTL_S,
    ),
    Scenario("wipe", "restart with an empty disk", again_and_again(wipe)),
)
