"""`python -m tests.fuzz`: a minute of everything by default; `--help` has the rest."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from typing import Final

import click
import uvloop

from tests.fuzz.contents import contents_property
from tests.fuzz.decoding import decoder_property
from tests.fuzz.exchanges import Host, exchanges_property
from tests.fuzz.rounds import Property, rounds
from tests.fuzz.session import Arena, properties
from tests.fuzz.storm import Storm
from tests.fuzz.tunnels import tunnels_property

STORM_REQUESTS: Final = 100_000
SHARES: Final = {
    "storm": 0.3,
    "decoder": 0.16,
    "server": 0.13,
    "client": 0.13,
    "handshake": 0.06,
    "contents": 0.1,
    "tunnels": 0.06,
    "exchanges": 0.06,
}
PURE: Final = {"decoder": decoder_property, "contents": contents_property}
"""The parts without an event loop, which can be fuzzed with coverage, too."""
_REPORT_EVERY_S: Final = 2.0


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--seconds", type=click.IntRange(min=1), default=60, show_default=True, help="For all parts.")
@click.option("--seed", type=int, help="Where to begin: what a failure tells you. [default: the day]")
@click.option("--part", "parts", multiple=True, type=click.Choice(list(SHARES)), help="Only these.")
@click.option("--requests", type=click.IntRange(min=1), default=STORM_REQUESTS, show_default=True)
def main(seconds: int, seed: int | None, parts: tuple[str, ...], requests: int) -> None:
    """Look for what breaks the request planes: their decoders, their sessions, their bookkeeping.

    The storm of randomly cancelled requests is always run to its end; the others take the time that is left,
    and a second at least.
    """
    chosen = parts or tuple(SHARES)
    first_seed = int(time.time() // 86_400) * 10_000 if seed is None else seed
    click.echo(f"fuzzing {', '.join(chosen)} for {seconds} s from seed {first_seed} on")
    began, whole = time.monotonic(), sum(SHARES[part] for part in chosen)
    for part in chosen:
        left_s = seconds - (time.monotonic() - began)
        share_s = max(1.0, left_s * SHARES[part] / whole)
        whole -= SHARES[part]
        try:
            _run(part, first_seed, share_s, requests)
        except BaseException:
            click.echo(f"{part} failed; the last seed above leads there again: --part {part} --seed SEED")
            raise
    click.echo(f"nothing found in {time.monotonic() - began:.0f} s")


def _run(part: str, seed: int, seconds: float, requests: int) -> None:
    if part == "storm":
        _storms(seed, seconds, requests)
    elif part in PURE:
        guided = importlib.util.find_spec("atheris") is not None
        rounds(PURE[part], seed, seconds / 2 if guided else seconds, Report(part))
        if guided:
            _guided(part, seed, seconds / 2)
        else:
            click.echo(f"{part}: without atheris no coverage is looked at")
    elif part == "tunnels":
        rounds(tunnels_property, seed, seconds, Report(part))
    elif part == "exchanges":
        with Host() as host:
            rounds(lambda: exchanges_property(host), seed, seconds, Report(part))
    else:
        with Arena() as arena:
            rounds(lambda: _property(arena, part), seed, seconds, Report(part))


def _property(arena: Arena, part: str) -> Property:
    return properties(arena)[part]


def _storms(seed: int, seconds: float, requests: int) -> None:
    """Run one storm, and more while there is time."""
    deadline = time.monotonic() + seconds
    while True:
        click.echo(f"storm: {requests} requests, seed {seed}")
        began, storm = time.monotonic(), Storm(seed)
        uvloop.run(storm.run(requests))
        ends = sum(number for (_, outcome), number in storm.outcomes.items() if outcome == "ended")
        took_s = time.monotonic() - began
        click.echo(f"storm: {took_s:.1f} s, {ends} without an error, {requests - ends} with; nothing left")
        seed += 1
        if time.monotonic() + took_s > deadline:
            return


def _guided(part: str, seed: int, seconds: float) -> None:
    """Run a part in a process that atheris drives."""
    numbers = str(max(1, round(seconds))), str(seed & 0x7FFFFFFF)
    command = [sys.executable, "-m", "tests.fuzz.guided", part, *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 120)
    found = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    click.echo("\n".join([f"{part}, guided: {last}", *found]))
    if done.returncode:
        raise AssertionError(found[0] if found else done.stderr[-2000:])


class Report:
    """Prints how far a part has come, at most every `_REPORT_EVERY_S`."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._at = -_REPORT_EVERY_S

    def __call__(self, examples: int, seed: int) -> None:
        if time.monotonic() - self._at >= _REPORT_EVERY_S:
            self._at = time.monotonic()
            click.echo(f"{self._part}: {examples} examples, now seed {seed}")


if __name__ == "__main__":
    main()
