"""What `up` shows while it runs: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from dynamo_redis.cli.failures import discard_output
from dynamo_redis.cli.formats import human_duration, printable
from dynamo_redis.cli.output import print_line

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

_MODELS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Status:
    """How a deployment is, as its frontend's `/health` says it.

    `running_count` of the `workers_count` workers of `up` run now; `instances_count` is what the frontend
    finds in the registry: also others' workers, and for its lease's time one that was killed.
    """

    answering: bool
    serving: bool
    redis_away: bool
    workers_count: int
    running_count: int
    instances_count: int
    models: tuple[str, ...]
    hit_percent: int | None = field(default=None, compare=False)
    """How many of a hundred prompt tokens the workers had in their caches; None if nobody counts. It changes
    all the time, and is no reason to print a line."""

    @property
    def headline(self) -> str:
        """The whole in a word or two."""
        if not self.answering:
            return "the frontend does not answer"
        return "serving" if self.serving else "no worker can serve"

    def details(self) -> list[str]:
        """The parts of the line, in its order."""
        names = ", ".join(self.models[:_MODELS_SHOWN])
        more = f" and {len(self.models) - _MODELS_SHOWN} more" if len(self.models) > _MODELS_SHOWN else ""
        parts = [f"{self.running_count}/{self.workers_count} workers"]
        if self.answering and self.instances_count != self.running_count:
            parts.append(f"{self.instances_count} instance{'s' * (self.instances_count != 1)} registered")
        if self.models:
            parts.append(f"model{'s' * (len(self.models) > 1)} {names}{more}")
        if self.hit_percent is not None:
            parts.append(f"{self.hit_percent} % cache hits")
        if self.redis_away:
            parts.append("Redis is away, serving from the last view")
        return parts


class Display(Protocol):
    """Where `up` writes: lines of the services, lines of its own, and a status that replaces the last one.

    No method raises when nobody reads any more: what runs goes on, and must still be stopped in order.
    """

    def notice(self, line: str) -> None: ...
    def log(self, service: str, line: str) -> None: ...
    def status(self, status: Status) -> None: ...
    def close(self) -> None: ...


class PlainDisplay:
    """Lines only: logs to stderr, and a status line on stdout whenever it changed."""

    def __init__(self) -> None:
        self._shown: Status | None = None

    def notice(self, line: str) -> None:
        try:
            print_line(line)
        except OSError:
            discard_output()

    def log(self, service: str, line: str) -> None:
        with suppress(OSError):
            sys.stderr.write(f"{service} | {line}\n")
            sys.stderr.flush()

    def status(self, status: Status) -> None:
        if status != self._shown:
            self._shown = status
            self.notice(f"status: {', '.join([status.headline, *status.details()])}")

    def close(self) -> None:
        """Nothing to restore."""


class LiveDisplay:
    """A line at the bottom of the terminal that is drawn anew; everything else scrolls above it.

    Before the first status it writes plain lines: rich is imported only then, when the deployment is up.
    """

    def __init__(self) -> None:
        self._plain = PlainDisplay()
        self._started_s = time.monotonic()
        self._status: Status | None = None
        self._live: Live | None = None

    def notice(self, line: str) -> None:
        if self._live is None:
            self._plain.notice(line)
        else:
            # Without wrapping, so that a line can be copied as it is.
            with suppress(OSError):
                self._live.console.print(line, soft_wrap=True)

    def log(self, service: str, line: str) -> None:
        if self._live is None:
            self._plain.log(service, line)
        else:
            with suppress(OSError):
                self._live.console.print(f"{service} | {printable(line)}", style="dim", soft_wrap=True)

    def status(self, status: Status) -> None:
        self._status = status
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(highlight=False, markup=False, emoji=False)
            self._live = Live(
                get_renderable=self._render, console=console, refresh_per_second=2, transient=True
            )
            with suppress(OSError):
                self._live.start()

    def close(self) -> None:
        """Take the line away."""
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()
            self._live = None

    def _render(self) -> Text:
        from rich.text import Text

        status = self._status
        if status is None:
            return Text()
        colour = "red" if not status.answering else "green" if status.serving else "yellow"
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append("● ", colour)
        line.append(status.headline, f"bold {colour}")
        up = f"up {human_duration(time.monotonic() - self._started_s)}"
        for part in (*status.details(), up, "Ctrl-C stops"):
            line.append("  ·  ", "dim").append(part)
        return line


def make_display() -> Display:
    """The live line where stdout is a terminal."""
    return LiveDisplay() if sys.stdout.isatty() else PlainDisplay()
