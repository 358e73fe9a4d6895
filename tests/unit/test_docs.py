"""The pages are true to the tree: their links lead somewhere, the tests they name exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.page import losses, table

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"])


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
