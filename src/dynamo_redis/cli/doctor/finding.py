"""The outcome of one check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["pass", "warn", "fail", "unknown"]
"""`warn`: it works, and something is lost, slow or open in some case. `fail`: processes cannot work, or will
stop to. `unknown`: the server does not let this user see it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    `text` is one line. `fix` says what to do; empty if there is nothing to do. `data` are figures for
    programs. `plot` are lines of a picture for a terminal.
    """

    check: str
    level: Level
    text: str
    fix: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    plot: tuple[str, ...] = ()
