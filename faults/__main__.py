"""`python -m faults`: the short form by default; `--help` has the rest."""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
import uvloop
from rich.console import Console

from faults import report
from faults.run import Scenario
from faults.scenarios import ALL
from faults.servers import ServerKind, installed_servers
from faults.session import Options, Plan, Result, perform_all
from faults.stores import StoreName

SHORT_LOAD_S: Final = 4.0
LONG_LOAD_S: Final = 15.0
SHORT_BEGIN_S: Final = 60.0
"""In the short form no run begins after this many seconds: the last ones end within 90 s."""
ALWAYS: Final = frozenset(
    {
        "mixed",
        "trim",
        "failover-equal",
        "failover-behind",
        "failover-planned",
        "full",
        "clock-steps",
        "locks-flushall",
        "exclusive-mixed",
    }
)
"""Scenarios that are always part of the short form."""
RESULTS: Final = Path(__file__).parent / "results"
PLAIN_WIDTH: Final = 140
KEPT: Final = Path(".faults")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--list", "list_only", is_flag=True, help="List scenarios and servers, and run none.")
@click.option(
    "--scenario", "names", multiple=True, metavar="NAME", help="Run only this scenario (may be repeated)."
)
@click.option(
    "--server",
    "servers",
    multiple=True,
    metavar="NAME",
    help="Run only on this server, e.g. redis-6.2 (may be repeated).",
)
@click.option(
    "--store",
    type=click.Choice(["plain", "sentinel", "cluster"]),
    default="plain",
    show_default=True,
    help="How processes reach their servers.",
)
@click.option("--seed", type=int, help="Run only this seed, which the report of a failure names.")
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Number of seeds, from 1."
)
@click.option("--long", "is_long", is_flag=True, help="Run every scenario on every server; write results/.")
@click.option("--load-s", type=float, help="Seconds of faults a run. [default: 4; 15 in the long form]")
@click.option(
    "--jobs", type=click.IntRange(1, 16), default=3, show_default=True, help="Number of runs at a time."
)
@click.option("--keep", is_flag=True, help="Keep all histories, not only those of failed runs.")
def main(
    list_only: bool,
    names: tuple[str, ...],
    servers: tuple[str, ...],
    store: StoreName,
    seed: int | None,
    seeds: int,
    is_long: bool,
    load_s: float | None,
    jobs: int,
    keep: bool,
) -> None:
    """Break Redis in every way, under load, and check that every promise held.

    Without options: the short form, at most 90 s. As many scenarios as there is time for, each on one of the
    servers that are installed; scenarios, servers and seeds change from day to day.

    Each run has a server and processes of its own. Their histories are judged afterwards. When a promise was
    broken, the exit code is 1, the histories are kept, and the command that makes the run again is printed. A
    seed fixes the faults and their times; the processes race anew each time.
    """
    for name in names:
        if name not in ALL:
            raise click.BadParameter(
                f"there is no scenario {name!r}; --list shows all", param_hint="--scenario"
            )
    scenarios = [one for one in ([ALL[name] for name in names] or ALL.values()) if store in one.stores]
    if not scenarios:
        raise click.UsageError(f"{', '.join(names)}: not on --store {store}")
    kinds = _kinds(servers)
    if list_only:
        for scenario in scenarios:
            click.echo(f"{scenario.name:<22} {scenario.summary}")
        click.echo(f"\nservers: {', '.join(kind.name for kind in kinds)}")
        return
    short = not (is_long or names or servers or seed is not None or seeds > 1 or load_s)
    wanted = [seed] if seed is not None else list(range(1, seeds + 1))
    load_s = load_s or (LONG_LOAD_S if is_long else SHORT_LOAD_S)
    if short:
        plans = _take_turns(scenarios, kinds, store)
    else:
        plans = [Plan(*parts, load_s, store) for parts in itertools.product(scenarios, kinds, wanted)]
    options = Options(KEPT, jobs, keep)
    began = time.monotonic()
    results = _perform(plans, options, began + SHORT_BEGIN_S if short else float("inf"))
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(report.table(results))
    left = len(plans) - len(results)
    console.print(
        f"{len(results)} runs in {time.monotonic() - began:.0f} s"
        + (f"; there was no time for {left} others, which run on other days" if left else "")
    )
    if is_long:
        for path in report.write_results(results, RESULTS):
            console.print(f"wrote {path}")
    sys.exit(1 if any(result.bad for result in results) else 0)


def _perform(plans: Sequence[Plan], options: Options, until: float) -> list[Result]:
    console = Console(stderr=True, width=None if sys.stderr.isatty() else PLAIN_WIDTH)
    return uvloop.run(
        perform_all(plans, options, lambda result: report.progress(console, result), until=until)
    )


def _kinds(names: Sequence[str]) -> list[ServerKind]:
    installed = installed_servers()
    unknown = set(names) - {kind.name for kind in installed}
    if unknown or not installed:
        there = ", ".join(kind.name for kind in installed) or "none"
        raise click.UsageError(f"not installed: {', '.join(unknown) or 'any server'} (there is: {there})")
    return [kind for kind in installed if not names or kind.name in names]


def _take_turns(scenarios: Sequence[Scenario], kinds: Sequence[ServerKind], store: StoreName) -> list[Plan]:
    """Return a plan of each scenario on one server, with a seed and in an order that change from day to day.
    The scenarios that reach most of the code always come first."""
    day = int(time.time() // 86400)
    order = random.Random(day).sample(list(scenarios), len(scenarios))
    order.sort(key=lambda scenario: scenario.name not in ALWAYS)
    servers = itertools.islice(itertools.cycle(kinds), day % len(kinds), None)
    return [
        Plan(scenario, kind, day, SHORT_LOAD_S, store) for scenario, kind in zip(order, servers, strict=False)
    ]


if __name__ == "__main__":
    main()
