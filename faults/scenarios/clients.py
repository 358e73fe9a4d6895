"""Actions of an operator or a managed service on a server's clients and settings."""

from __future__ import annotations

from faults.run import Run, Scenario
from faults.scenarios.crashes import again_and_again


async def kill_clients(run: Run) -> None:
    """Kill all clients (CLIENT KILL), one, or one kind."""
    async with run.fault("CLIENT KILL"):
        match run.rng.choice(("all", "one", "normal", "pubsub")):
            case "all":
                await run.server.kill_clients()
            case "one":
                ids = await run.server.client_ids()
                if ids:
                    await run.server.kill_clients("ID", run.rng.choice(ids))
            case kind:
                await run.server.kill_clients("TYPE", kind, "SKIPME", "yes")


async def lose_notifications(run: Run) -> None:
    """Stop the announcements of expiry, or break the subscriptions."""
    async with run.fault("notifications"):
        if run.rng.random() < 0.5:
            await run.server.execute("CONFIG", "SET", "notify-keyspace-events", "")
            await run.pause(0.5, 2.0)
        else:
            await run.server.kill_clients("TYPE", "pubsub", "SKIPME", "yes")


async def _without_notifications(run: Run) -> None:
    """Switch notifications off from the start to the end."""
    while not run.over:
        await run.server.execute("CONFIG", "SET", "notify-keyspace-events", "")
        await run.pause(0.05, 0.2)


SCENARIOS = (
    Scenario(
        "client-kill",
        "CLIENT KILL of all, one, a kind",
        again_and_again(kill_clients, 0.05, 0.6),
        keeps_leases=True,
    ),
    Scenario(
        "lost-notifications",
        "expiry notifications switched off, subscriptions broken",
        again_and_again(lose_notifications, 0.1, 1.0),
        keeps_leases=True,
    ),
    Scenario(
        "no-notifications",
        "expiry notifications kept switched off",
        _without_notifications,
        keeps_leases=True,
    ),
)
