"""A session of many runs: scenarios, seeds and servers; several runs at a time; and their results."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from faults.run import Figures, Run, Scenario, Skipped
from faults.servers import ServerKind
from faults.stores import StoreName

JUDGE_TIMEOUT_S: Final = 120.0
RUN_TIMEOUT_S: Final = 180.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A run to be made."""

    scenario: Scenario
    kind: ServerKind
    seed: int
    load_s: float
    store: StoreName = "plain"

    def __str__(self) -> str:
        return f"{self.scenario.name} on {self.server}, seed {self.seed}"

    @property
    def server(self) -> str:
        """The server's name, with that of the store unless it is plain."""
        return self.kind.name if self.store == "plain" else f"{self.kind.name}-{self.store}"

    @property
    def replay(self) -> str:
        """The command that makes it again: the same faults at the same times; the processes race anew."""
        run = f"--scenario {self.scenario.name} --server {self.kind.name} --seed {self.seed}"
        run += f" --store {self.store}" * (self.store != "plain")
        return f'make faults ARGS="{run} --load-s {self.load_s:g}"'


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a run. `violations` are (oracle, report); `kept` is the directory of its histories."""

    plan: Plan
    figures: Figures | None
    violations: tuple[tuple[str, str], ...] = ()
    skipped: str | None = None
    failed: str | None = None
    kept: Path | None = None

    @property
    def bad(self) -> bool:
        """True if a promise was broken, or the run could not be carried out."""
        return bool(self.violations) or self.failed is not None


@dataclass(frozen=True, slots=True)
class Options:
    """The options of runs. `keep`: also keep the histories of runs without a violation."""

    directory: Path
    jobs: int
    keep: bool = False


async def perform_all(
    plans: Sequence[Plan], options: Options, report: Callable[[Result], None], *, until: float = float("inf")
) -> list[Result]:
    """Make the runs in order, `jobs` at a time, and return their results; none begins after `until`
    (monotonic)."""
    results: list[Result] = []
    queue = list(reversed(plans))

    async def work() -> None:
        while queue and time.monotonic() < until:
            result = await perform(queue.pop(), options)
            results.append(result)
            report(result)

    async with asyncio.TaskGroup() as group:
        for _ in range(options.jobs):
            group.create_task(work())
    return results


async def perform(plan: Plan, options: Options) -> Result:
    """Make one run and judge it."""
    directory = options.directory / f"{plan.server}-{plan.scenario.name}-{plan.seed}"
    shutil.rmtree(directory, ignore_errors=True)
    figures: Figures | None = None
    try:
        run = Run(plan.scenario, plan.kind, plan.seed, directory, load_s=plan.load_s, store=plan.store)
        async with asyncio.timeout(RUN_TIMEOUT_S):
            figures = await run.perform()
            violations = await _judge(directory)
    except Skipped as exc:
        shutil.rmtree(directory, ignore_errors=True)
        return Result(plan, None, skipped=str(exc))
    except Exception as exc:  # noqa: BLE001 - one run that breaks down does not end the session
        return Result(plan, figures, failed=_describe(exc), kept=directory)
    if violations or options.keep:
        return Result(plan, figures, violations, kept=directory)
    shutil.rmtree(directory, ignore_errors=True)
    return Result(plan, figures)


async def _judge(directory: Path) -> tuple[tuple[str, str], ...]:
    """Return the oracles' findings, from a process of their own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "faults.judge", "--json", str(directory)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(JUDGE_TIMEOUT_S):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return (("judge", f"the oracles had not decided after {JUDGE_TIMEOUT_S:g} s"),)
    if process.returncode not in (0, 1) or not output:
        raise RuntimeError(f"the oracles broke down:\n{errors.decode()}")
    return tuple((oracle, text) for oracle, text in json.loads(output))


def _describe(exc: BaseException) -> str:
    """Return an exception as one line; of a group, the first."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return f"{type(exc).__name__}: {exc}"
