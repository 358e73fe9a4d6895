"""Prints findings: a line each for people, with the fix below; a list for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import click

from dynamo_redis.cli.doctor.finding import Finding, Level
from dynamo_redis.cli.formats import printable, redact
from dynamo_redis.cli.output import print_json

_COLOURS: Final[dict[Level, str]] = {"pass": "green", "warn": "yellow", "fail": "red", "unknown": "blue"}
_WORDS: Final[dict[Level, str]] = {"pass": "pass", "warn": "warn", "fail": "FAIL", "unknown": "  ? "}
_NAME_COLUMNS: Final = 14
_INDENT: Final = " " * 6


def print_findings(findings: Sequence[Finding]) -> None:
    """Print findings for people; colours only on a terminal."""
    for finding in findings:
        level = click.style(_WORDS[finding.level], fg=_COLOURS[finding.level], bold=finding.level == "fail")
        click.echo(f"{level}  {finding.check.ljust(_NAME_COLUMNS)}{_shown(finding.text)}")
        below = " " * _NAME_COLUMNS
        for line in finding.plot:
            click.echo(f"{_INDENT}{below}{line}")
        if finding.fix:
            click.echo(f"{_INDENT}{below}{click.style('→ ' + _shown(finding.fix), dim=True)}")
    click.echo(_summary(findings))


def print_findings_json(findings: Sequence[Finding]) -> None:
    """Print findings for programs."""
    print_json([_json(finding) for finding in findings])


def _json(finding: Finding) -> dict[str, Any]:
    shown = asdict(finding)
    del shown["plot"]
    return {**shown, "text": redact(finding.text), "fix": redact(finding.fix)}


def _summary(findings: Sequence[Finding]) -> str:
    counts = {level: sum(finding.level == level for finding in findings) for level in _WORDS}
    words = {"pass": "passed", "warn": "warned", "fail": "failed", "unknown": "not visible"}
    return ", ".join(f"{count} {words[level]}" for level, count in counts.items() if count)


def _shown(text: str) -> str:
    """Return a text on one line, without passwords and control characters."""
    return printable(redact(" ".join(text.split())))
