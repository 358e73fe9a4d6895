"""What `up` shows while it runs: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dynamo_redis.cli.formats import human_duration, printable
from dynamo_redis.cli.output import print_line

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True, slots=True)
class Status:
    """How a deployment is. `serving` is what the frontend's `/health` says; counts come from it, too."""

    serving: bool
    answering: bool
    workers_wanted: int
    instances_ready: int
    models: tuple[str, ...]
    requests_count: int | None = None
    in_flight_count: int | None = None

    @property
    def headline(self) -> str:
        """One word or two on the whole."""
        if not self.answering:
            return "frontend does not answer"
        return "serving" if self.serving else "not serving"

    def details(self) -> list[str]:
        """The parts of the line, in its order."""
        parts = [
            f"{self.instances_ready}/{self.workers_wanted} instances",
            f"{len(self.models)} model{'s' * (len(self.models) != 1)}",
        ]
        if self.requests_count is not None:
            parts.append(f"{self.requests_count} request{'s' * (self.requests_count != 1)}")
        if self.in_flight_count:
            parts.append(f"{self.in_flight_count} in flight")
        return parts


class Display(Protocol):
    """Where `up` writes: lines of the services, lines of its own, and a status that replaces the last one."""

    def notice(self, line: str) -> None: ...
    def log(self, service: str, line: str) -> None: ...
    def status(self, status: Status) -> None: ...
    def close(self) -> None: ...


class PlainDisplay:
    """Lines only: logs to stderr, and a status line on stdout whenever something other than a counter
    changed."""

    def __init__(self) -> None:
        self._shown: tuple[object, ...] = ()

    def notice(self, line: str) -> None:
        print_line(line)

    def log(self, service: str, line: str) -> None:
        sys.stderr.write(f"{service} | {line}\n")
        sys.stderr.flush()

    def status(self, status: Status) -> None:
        state = (status.headline, status.instances_ready, status.models)
        if state != self._shown:
            self._shown = state
            print_line(f"status: {', '.join([status.headline, *status.details()])}")

    def close(self) -> None:
        """Nothing to restore."""


class LiveDisplay:
    """A line at the bottom of the terminal that is drawn anew; everything else scrolls above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(highlight=False, markup=False, emoji=False)
        self._started_s = time.monotonic()
        self._status: Status | None = None
        self._live = Live(
            get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True
        )

    def notice(self, line: str) -> None:
        # Without wrapping, so that a line can be copied as it is.
        self._console.print(line, soft_wrap=True)

    def log(self, service: str, line: str) -> None:
        from rich.text import Text

        self._console.print(Text.assemble((f"{service} | ", "dim cyan"), printable(line)), soft_wrap=True)

    def status(self, status: Status) -> None:
        self._status = status
        if not self._live.is_started:
            self._live.start()

    def close(self) -> None:
        """Take the line away."""
        self._live.stop()

    def _render(self) -> Text:
        from rich.text import Text

        status = self._status
        if status is None:
            return Text()
        colour = "green" if status.serving else "red" if not status.answering else "yellow"
        up = f"up {human_duration(time.monotonic() - self._started_s)}"
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append("● ", colour).append(status.headline, f"bold {colour}")
        for part in (*status.details(), up, "Ctrl-C stops"):
            line.append("  ·  ", "dim").append(part)
        return line


def make_display() -> Display:
    """The live line where stdout is a terminal."""
    return LiveDisplay() if sys.stdout.isatty() else PlainDisplay()
