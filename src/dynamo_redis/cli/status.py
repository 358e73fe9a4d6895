"""The output of a running `up`: a live line on a terminal, plain lines elsewhere."""

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
    """The state of a deployment, from its frontend's `/health`.

    `running_count` of the `workers_count` workers of `up` run now. `instances_count` is the number of
    instances that the frontend finds in the registry: it includes workers that `up` did not start, and a
    killed worker until its lease ends.
    """

    answering: bool
    serving: bool
    redis_away: bool
    workers_count: int
    running_count: int
    instances_count: int
    models: tuple[str, ...]
    hit_percent: int | None = field(default=None, compare=False)
    """Percentage of the prompt tokens that the workers had in their caches; None if no router counts them.

    Not compared: it changes all the time, and a change of it alone prints no line.
    """

    @property
    def headline(self) -> str:
        """The state in a few words."""
        if not self.answering:
            return "the frontend does not answer"
        return "serving" if self.serving else "no worker can serve"

    def details(self) -> list[str]:
        """Return the parts of the status line after the headline."""
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
    """The output of `up`: lines of the services, lines of its own, and a status that replaces the last one.

    No method raises if the output is closed: the services run on, and must still be stopped in order.
    """

    def notice(self, line: str) -> None: ...
    def log(self, service: str, line: str) -> None: ...
    def status(self, status: Status) -> None: ...
    def close(self) -> None: ...


class PlainDisplay:
    """Plain lines: logs on stderr, and a status line on stdout each time that the status has changed."""

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
        """Do nothing: a terminal needs no restoring."""


class LiveDisplay:
    """A status line at the bottom of the terminal; all other lines scroll above it.

    Before the first status it writes plain lines: rich is imported only once the deployment is up.
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
            # No wrapping: the user can copy the line.
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
            from rich.text import Text

            def render() -> Text:
                shown = self._status
                if shown is None:
                    return Text()
                colour = "red" if not shown.answering else "green" if shown.serving else "yellow"
                line = Text(no_wrap=True, overflow="ellipsis")
                line.append("● ", colour)
                line.append(shown.headline, f"bold {colour}")
                up = f"up {human_duration(time.monotonic() - self._started_s)}"
                for part in (*shown.details(), up, "Ctrl-C stops"):
                    line.append("  ·  ", "dim").append(part)
                return line

            console = Console(highlight=False, markup=False, emoji=False)
            self._live = Live(get_renderable=render, console=console, refresh_per_second=2, transient=True)
            with suppress(OSError):
                self._live.start()

    def close(self) -> None:
        """Remove the status line."""
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()
            self._live = None


def make_display() -> Display:
    """Return a live display if stdout is a terminal, else a plain one."""
    return LiveDisplay() if sys.stdout.isatty() else PlainDisplay()
