"""Faults of the network between the processes and the server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from faults.oracles.served import EVERYTHING
from faults.proxy import BLACK_HOLE, STALL, Conditions, Link
from faults.run import Load, Run, Scenario
from faults.scenarios.crashes import KEPT_TTL_S, again_and_again

Strike = Callable[[Run, Link], None]


def _conditions(conditions: Conditions) -> Strike:
    def strike(_: Run, proxy: Link) -> None:
        proxy.conditions = conditions

    return strike


def _slow(run: Run, proxy: Link) -> None:
    proxy.conditions = Conditions(delay_s=run.rng.uniform(0, 0.3), bytes_per_s=run.rng.uniform(2e3, 5e4))


def _half_close(run: Run, proxy: Link) -> None:
    proxy.half_close(run.rng.choice(("client", "server")))


def _cut(run: Run, proxy: Link) -> None:
    if run.rng.random() < 0.5:
        proxy.cut()
    else:
        proxy.cut_one()


def _refuse(_: Run, proxy: Link) -> None:
    proxy.refuse = True
    proxy.cut()


def _one_connection(run: Run, proxy: Link) -> None:
    """Break one connection of the process, while its others work."""
    if proxy.connections:
        chosen = run.rng.choice(proxy.connections)
        chosen.conditions = run.rng.choice((BLACK_HOLE, STALL, Conditions(swallow_answers=True)))


STRIKES: Final[dict[str, tuple[str, Strike]]] = {
    "drop-answers": ("answers are lost, requests arrive", _conditions(Conditions(swallow_answers=True))),
    "drop-requests": ("requests are lost", _conditions(Conditions(swallow_requests=True))),
    "black-hole": ("connections are accepted, nothing comes through", _conditions(BLACK_HOLE)),
    "stall": ("nothing comes through for a while, then everything", _conditions(STALL)),
    "slow": ("2 to 50 kB/s, with delays", _slow),
    "half-close": ("one side hears that nothing more comes", _half_close),
    "cut": ("connections break", _cut),
    "refuse": ("connections break, new ones are refused", _refuse),
    "one-connection": ("one of a process's connections goes dead, the others work", _one_connection),
}


async def strike(run: Run, name: str) -> None:
    """Apply one of `STRIKES` to some of the processes, for up to 3 s: longer than any wait for an answer."""
    proxies = run.some_proxies()
    names = [process for process, proxy in run.proxies.items() if proxy in proxies]
    async with run.fault(name, processes=names):
        for proxy in proxies:
            STRIKES[name][1](run, proxy)
        await run.pause(0.05, 0.6 if run.rng.random() < 0.5 else 3.0)
        for proxy in proxies:
            proxy.heal()


def _scenario(name: str) -> Scenario:
    return Scenario(name, STRIKES[name][0], again_and_again(lambda run: strike(run, name), 0.1, 0.8))


def _on_slow_links(bytes_per_s: float) -> Callable[[Run], Awaitable[None]]:
    """Return faults that let all traffic go over links of `bytes_per_s`, one for each process, from the start
    to the end."""

    async def faults(run: Run) -> None:
        async with run.fault("slow links", serves=EVERYTHING, bytes_per_s=bytes_per_s):
            for proxy in run.proxies.values():
                proxy.conditions = Conditions(link_bytes_per_s=bytes_per_s)
            while not run.over:
                await run.pause(0.1, 0.2)
            for proxy in run.proxies.values():
                proxy.heal()

    return faults


SCENARIOS = (
    *(_scenario(name) for name in STRIKES),
    Scenario(
        "slow-large",
        "values of 1 MiB over links of 1 MB/s",
        _on_slow_links(1e6),
        load=Load({"hoarder": 1, "writer": 1, "worker": 2, "watcher": 2}),
        keeps_leases=True,
        ttl_s=KEPT_TTL_S,
    ),
    Scenario(
        "objects-slow-link",
        "objects: of up to 2.5 MiB over links of 500 kB/s",
        _on_slow_links(5e5),
        load=Load({"uploader": 2, "reader": 2}),
    ),
)
