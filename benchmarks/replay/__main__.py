"""Replays a trace of real requests through real processes, and reports the result of each way of routing.

Each run has one Redis, mock workers, and router replicas with the users behind them, which send their share
of the requests as token ids: real sockets, real KV events, in scaled time. Workers share processes, four in
each, with a runtime, an instance and connections of their own. The omniscient router is simulated, on the
same engines and caches.


Times are the trace's: with a speedup of 5, a millisecond of this machine counts as five. Without --trace it
is Mooncake's hour of chats where that lies beside the checkout, or else a made-up one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

import uvloop
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.harness.options import length_s, rounds_count
from benchmarks.harness.processes import REPOSITORY, rival_python
from benchmarks.replay.figures import figures
from benchmarks.replay.plan import MODES, Arrivals, Mode, Plan, Workload
from benchmarks.replay.report import OMNISCIENT, PATH, Entry, print_table, run_entry, save, simulated_entry
from benchmarks.replay.run import Fault, RunResult, run
from benchmarks.replay.simulation import Omniscient, simulate
from dynamo_redis.store.server import EmbeddedServer

FAULT_AT: Final = 0.4
"""Time of a fault, as a part of the time in which requests are due."""


@dataclass(frozen=True, slots=True)
class Options:
    """The runs, and the files that they write."""

    base: Plan
    modes: Sequence[Mode]
    replicas: Sequence[int]
    arrivals: Sequence[Arrivals]
    faults: Sequence[Fault]
    given_requests: int
    given_speedup: float
    results: Path
    plot: bool
    simulated: bool
    late_s: float
    counts_once: bool
    repeats: int

    def plan(self, arrivals: Arrivals, mode: Mode = "kv", replicas: int = 1) -> Plan:
        """Return one run's plan."""
        plan = replace(self.base, arrivals=arrivals, mode=mode, replicas=replicas)
        if arrivals == "given":
            return replace(plan, speedup=self.given_speedup, requests=self.given_requests)
        return plan

    def repeated(self, plan: Plan) -> list[Plan]:
        """Return a plan for each repetition, each with arrivals and chance of its own."""
        return [replace(plan, seed=plan.seed + number) for number in range(self.repeats)]

    @property
    def runs(self) -> list[tuple[Plan, Fault | None]]:
        """All runs, in order."""
        plain = [
            (self.plan(arrivals, mode, replicas), None)
            for arrivals in self.arrivals
            for mode in self.modes
            for replicas in self.replicas
        ]
        broken = [(self.plan(self.arrivals[0], "kv", max(self.replicas)), fault) for fault in self.faults]
        return [*plain, *broken]


def main(arguments: Sequence[str] | None = None) -> list[Entry]:
    """Run the plans of the command line, and return the rows."""
    options = parse(arguments)
    try:
        trace = options.base.load_trace()
    except (OSError, ValueError) as exc:
        sys.exit(f"the trace cannot be read: {exc}")
    count = len(trace.requests)
    options = replace(
        options,
        base=replace(options.base, requests=count),
        given_requests=min(options.given_requests, count),
    )
    print(f"trace {trace.name}", flush=True)
    entries = [_reference(options, options.plan(arrivals), trace.name) for arrivals in options.arrivals]
    if options.simulated:
        entries += [_simulated(options, plan, trace.name) for plan, fault in options.runs if fault is None]
        print_table(entries, _conditions(options))
        return entries
    entries += uvloop.run(_run_all(options, trace.name))
    print_table(entries, _conditions(options))
    save(entries, options.results)
    if options.plot and options.base.workload == "trace":
        _draw(options.results)
    return entries


def _draw(results: Path) -> None:
    try:
        python = rival_python("plot", "matplotlib")
        subprocess.run([python, "-m", "benchmarks.replay.plot", results], cwd=REPOSITORY, check=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        print(f"the figures are in {results.name}; the picture was not drawn: {exc}", file=sys.stderr)


def _reference(options: Options, plan: Plan, trace: str) -> Entry:
    """Simulate the omniscient router on the same arrivals and with the same chance among equals, and return
    its row."""
    found = [figures(simulate(one, Omniscient, seed=one.seed), one.workers) for one in options.repeated(plan)]
    return simulated_entry(plan, trace, found, mode=OMNISCIENT)


def _simulated(options: Options, plan: Plan, trace: str) -> Entry:
    """Simulate the plan's mode without processes, and return its row."""
    found = [
        figures(
            simulate(one, seed=one.seed, late_s=options.late_s, counts_once=options.counts_once),
            one.workers,
        )
        for one in options.repeated(plan)
    ]
    return simulated_entry(plan, trace, found, mode=plan.mode)


async def _run_all(options: Options, trace: str) -> list[Entry]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    entries: list[Entry] = []
    with tempfile.TemporaryDirectory() as directory, Progress(*columns) as progress:
        async with EmbeddedServer(Path(directory), port=0) as server:
            for plan, fault in options.runs:
                repeated = options.repeated(plan) if fault is None else [plan]
                task = progress.add_task(_title(plan, fault), total=plan.requests * len(repeated))
                faults = [(FAULT_AT, fault)] if fault is not None else []
                results: list[RunResult] = []
                for one in repeated:
                    before = plan.requests * len(results)

                    def advance(count: int, task: Any = task, before: int = before) -> None:
                        progress.update(task, completed=before + count)

                    results.append(await run(one, server, faults=faults, progress=advance))
                    advance(plan.requests)  # lost requests count, too
                entries.append(run_entry(plan, trace, fault, results))
                if not progress.console.is_terminal:  # a terminal shows the bars
                    print(f"{len(entries)} of {len(options.runs)}: {_title(plan, fault)}", flush=True)
    return entries


def _title(plan: Plan, fault: Fault | None) -> str:
    arrivals = "as given" if plan.arrivals == "given" else f"Poisson {plan.load:g}"
    routers = f"{plan.replicas} router{'s' if plan.replicas > 1 else ''}"
    return f"{arrivals}, {MODES[plan.mode]}, {routers}{f', {fault} killed' if fault else ''}"


def _conditions(options: Options) -> list[str]:
    plan = options.base
    return [
        (
            f"{plan.requests} requests (as given: {options.given_requests}), {plan.workers} mock workers;"
            f" means of {options.repeats} runs, seeds {plan.seed} to {plan.seed + options.repeats - 1}"
        ),
        f"a worker holds {plan.kv_blocks} blocks of 512 tokens, and reads 10,000 prompt tokens a second",
        f"times are the trace's, sped up {plan.speedup:g} times (as given: {options.given_speedup:g} times)",
        "hit rate: prompt tokens found in caches; balance: prompt tokens read, most loaded worker ÷ mean",
        "wrong: part of the tokens that a router believed cached and that were not, some evicted in between",
        "late: delay of the sending of requests, real time, 99th percentile; cores: of workers and routers",
    ]


# --------------------------------------------------------------------------- the command line

Choice = TypeVar("Choice")


def _comma_list(one: Callable[[str], Choice]) -> Callable[[str], list[Choice]]:
    """Return a parser of lists with commas, for argparse."""
    return lambda text: [one(part.strip()) for part in text.split(",")]


def _one_of(*choices: Choice) -> Callable[[str], Choice]:
    def choose(text: str) -> Choice:
        for choice in choices:
            if choice == text:
                return choice
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, choices))}")

    return choose


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The figures and a picture go to benchmarks/results/replay.json and replay.svg; rows that did "
        "not run keep their figures.",
    )
    _add_traffic(parser.add_argument)
    _add_deployment(parser.add_argument)
    _add_output(parser.add_argument)
    return parser


def _add_traffic(add: Callable[..., object]) -> None:
    """Add the options of the requests and the ways to route them."""
    add("--trace", type=Path, metavar="FILE", help="JSON lines as Mooncake's, plain or .gz")
    add(
        "--workload",
        choices=get_args(Workload),
        default="trace",
        help="trace, or requests made up from the seed: chats that grow (made-up), or that share long system "
        "prompts (shared-prompts) [trace]",
    )
    add(
        "--requests",
        type=rounds_count,
        default=1500,
        help="number of requests from the start of the trace, for poisson [1500]",
    )
    add(
        "--modes",
        type=_comma_list(_one_of(*get_args(Mode))),
        default=list(get_args(Mode)),
        help="modes of kv, predicted (kv without events), rr, p2c [all]",
    )
    add("--replicas", type=_comma_list(rounds_count), default=[1, 4], help="numbers of routers [1,4]")
    add(
        "--arrivals",
        type=_comma_list(_one_of(*get_args(Arrivals))),
        default=["poisson", "given"],
        help="arrivals of poisson, given (the trace's timestamps) [both]",
    )
    add(
        "--load",
        type=length_s,
        default=0.7,
        help="for poisson: prompt tokens that come ÷ those that the workers can read without caches [0.7]",
    )
    add(
        "--faults",
        type=lambda text: [] if text == "none" else _comma_list(_one_of(*get_args(Fault)))(text),
        default=list(get_args(Fault)),
        help="further runs of kv with most replicas, in which a process is killed and comes back: of router, "
        "redis, worker, or none [all]",
    )


def _add_deployment(add: Callable[..., object]) -> None:
    """Add the options of the workers, of time and of repetitions."""
    add("--workers", type=rounds_count, default=16, help="mock workers [16]")
    add("--kv-blocks", type=rounds_count, default=1024, help="blocks in each worker's cache [1024]")
    add("--speedup", type=length_s, default=5.0, help="trace seconds a second, for poisson [5]")
    add("--given-requests", type=rounds_count, help="the same for given [half as many]")
    add("--given-speedup", type=length_s, default=8.0, help="the same for given [8]")
    add("--seed", type=int, default=1, help="seed of arrivals, chance and made-up requests [1]")
    add(
        "--repeats",
        type=rounds_count,
        default=3,
        help="runs of each, with seeds from --seed on: the figures are their means [3]; with faults, one",
    )


def _add_output(add: Callable[..., object]) -> None:
    """Add the options of results and simulations."""
    add("--results", type=Path, default=PATH, metavar="FILE", help="file for the figures")
    add(
        "--simulate",
        action="store_true",
        help="simulate all modes with the product's own index, book and selector, without processes;"
        " saves nothing",
    )
    add(
        "--late-ms",
        type=float,
        default=20.0,
        help="in a simulation: delay in ms of events and of messages between routers,"
        " in the trace's time [20]",
    )
    add(
        "--count-again",
        action="store_true",
        help="in a simulation: count a block for each request that holds it, as earlier releases did",
    )
    add("--no-plot", action="store_true", help="do not draw the picture")


def parse(arguments: Sequence[str] | None) -> Options:
    """Parse the command line. Exits with a message for options that cannot be run."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.trace is not None and not given.trace.is_file():
        parser.error(f"there is no file {given.trace}")
    if given.workload != "trace" and (given.trace is not None or "given" in given.arrivals):
        parser.error(f"{given.workload} is made up: it goes without --trace and with --arrivals poisson")
    base = Plan(
        trace=given.trace and given.trace.resolve(),
        requests=given.requests,
        arrivals="poisson",
        load=given.load,
        seed=given.seed,
        workers=given.workers,
        kv_blocks=given.kv_blocks,
        speedup=given.speedup,
        workload=given.workload,
    )
    return Options(
        base=base,
        modes=given.modes,
        replicas=given.replicas,
        arrivals=given.arrivals,
        faults=given.faults,
        given_requests=given.given_requests or -(-given.requests // 2),
        given_speedup=given.given_speedup,
        results=given.results.resolve(),
        plot=not given.no_plot,
        simulated=given.simulate,
        late_s=given.late_ms / 1e3,
        counts_once=not given.count_again,
        repeats=given.repeats,
    )


if __name__ == "__main__":
    main()
