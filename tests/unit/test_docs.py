"""The pages are true to the tree: their links lead somewhere, the tests they name exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.pages import MARK, digits, lines, results, updated, written
from benchmarks.replay import report

from faults.page import losses, table

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"])
CONDITIONS = {"1.6", "1", "128", "64", "4", "1,000", "2,048", "300"}
"""Numbers of README's figures that say how they were measured."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize(("name", "made"), [("faults", table), ("losses", losses)])
def test_the_guarantees_show_what_was_measured(name: str, made: Callable[[], str]) -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    shown = re.search(f"<!-- {name} -->\n(.*)<!-- /{name} -->", page, re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == made().strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_install_lines_work_from_a_checkout(page: Path) -> None:
    """The package is in no index: pip finds it by a path alone."""
    wanted = re.findall(r"pip install ([^`#\n]+)", page.read_text())
    assert [line for line in wanted if "dynamo-redis" in line] == []


def test_every_proof_is_a_test() -> None:
    page = "\n".join((ROOT / "docs" / name).read_text() for name in ("replaces.md", "guarantees.md"))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 20
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_each_decision_has_a_number_of_its_own() -> None:
    """Gaps are fine: records are written side by side, under numbers taken before."""
    pages = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    numbers = [int(path.name[:4]) for path in pages]
    assert len(set(numbers)) == len(numbers) > 50
    for path, number in zip(pages, numbers, strict=True):
        assert path.read_text().startswith(f"# {number}. "), path.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_figures_are_those_that_were_measured(page: Path) -> None:
    """`python -m benchmarks.pages` brings them up to date."""
    text = page.read_text()
    assert updated(text, results(), lines()) == text


def test_each_figure_of_the_readme_names_its_row() -> None:
    (figures,) = re.findall(r"^\*\*Measured\*\*.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(MARK.findall(figures)) > 10
    assert set(re.findall(r"\d[\d,]*(?:\.\d+)?", MARK.sub("", figures))) <= CONDITIONS


def test_each_measured_row_is_shown() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert [line for line in lines().values() if line not in page] == []


def test_the_table_of_replays_is_what_was_measured() -> None:
    entries = report.load_entries()
    made = [
        line
        for trace in {entry.trace for entry in entries}
        for line in report.markdown([entry for entry in entries if entry.trace == trace]).splitlines()
    ]
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert [line for line in made if line not in page] == []


@pytest.mark.parametrize(
    ("shown", "value", "right"),
    [
        ("80,000", 79_930.0, "80,000"),
        ("31,800", 31_750.0, "31,800"),
        ("765,000", 764_900.0, "765,000"),
        ("24", 23.82, "24"),
        ("0.99", 0.9877, "0.99"),
        ("1.5", 0.694, "0.69"),
        ("0.7", 1.52, "1.5"),
        ("none", 0.0, "none"),
        ("none", 3.0, "3.0"),
    ],
)
def test_a_figure_is_written_as_precisely_as_before(shown: str, value: float, right: str) -> None:
    assert written(value, digits(shown)) == right
