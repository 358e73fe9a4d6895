"""The pages agree with the tree: their links have targets, the tests they name exist."""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Callable
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.pages import MARK, digits, lines, results, updated, written
from benchmarks.replay import report

from dynamo_redis import errors
from dynamo_redis.store.locks.memory import MemoryLocks
from dynamo_redis.store.registry.memory import MemoryRegistry, MemoryServer
from faults.page import losses, table
from tests.rendered_pages import (
    PAGES,
    ROOT,
    anchors,
    clicks_from,
    code_blocks,
    inline,
    links,
    name,
    rows_of_another_width,
)

SITE = ROOT / "tools" / "site" / "conf.py"
CONDITIONS = {"1.6", "1", "128", "64", "4", "1,000", "2,048", "300"}
"""Numbers beside the figures of the README that say how they were measured."""


PYTHON_BLOCKS = [
    pytest.param(page, code, id=f"{name(page)}-{number}")
    for page in PAGES
    for number, code in enumerate(code_blocks(page, "python"))
]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = [
        str(link)
        for link in links(page)
        if not link.target.exists()
        or (link.anchor and link.target.suffix == ".md" and link.anchor not in anchors(link.target))
    ]
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_are_shown_as_tables(page: Path) -> None:
    """A row after a blank line is shown as text with pipes; a surplus cell is not shown at all."""
    assert [piece.content for piece in inline(page) if piece.type == "text" and "|" in piece.content] == []
    assert rows_of_another_width(page) == []


def test_each_page_is_two_clicks_from_the_readme() -> None:
    clicks = clicks_from(ROOT / "README.md")
    assert [name(page) for page in PAGES if clicks.get(page, 99) > 2] == []


def test_the_site_lists_each_page() -> None:
    """`make docs` fails otherwise, but is run less often than the tests."""
    (contents,) = [
        ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(SITE.read_text()))
        if isinstance(node, ast.AnnAssign) and node.value and ast.unparse(node.target) == "CONTENTS"
    ]
    patterns = [f"{pattern}.md" for patterns in contents.values() for pattern in patterns]
    missing = [
        name(page)
        for page in PAGES
        if page != ROOT / "README.md" and not any(fnmatch(name(page), pattern) for pattern in patterns)
    ]
    assert missing == []


@pytest.mark.parametrize(("page", "code"), PYTHON_BLOCKS)
def test_python_on_pages_fits_the_package(page: Path, code: str) -> None:
    """Each block compiles, and its imports from this package exist."""
    tree = compile(code, name(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)
    assert isinstance(tree, ast.Module)
    compile(tree, name(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dynamo_redis"):
            module = import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize(("mark", "made"), [("faults", table), ("losses", losses)])
def test_guarantees_show_the_measured_figures(mark: str, made: Callable[[], str]) -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    shown = re.search(f"<!-- {mark} -->\n(.*)<!-- /{mark} -->", page, re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == made().strip()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_install_lines_work_from_a_checkout(page: Path) -> None:
    """The package is in no index: pip finds it by a path alone."""
    wanted = re.findall(r"pip install ([^`#\n]+)", page.read_text())
    assert [line for line in wanted if "dynamo-redis" in line] == []


async def test_the_registry_and_the_lock_on_their_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    """On the twins in memory; the watch of the first block has no end."""
    page = ROOT / "docs" / "python-api" / "registry.md"
    registry_block, _, lock_block = code_blocks(page, "python")
    registry = MemoryRegistry(MemoryServer())
    await registry.start()
    runtime = SimpleNamespace(registry=registry, locks=MemoryLocks())
    names: dict[str, Any] = {"runtime": runtime, "next_state": lambda state: (state or b"") + b"x"}
    await run(lock_block, names)
    await run(lock_block, names)
    assert (await runtime.locks.lock("reindex").read()).value == b"xx"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await run(registry_block, names)
    assert "jobs/7" in capsys.readouterr().out
    await registry.aclose()


async def run(code: str, names: dict[str, Any]) -> None:
    await eval(compile(code, "page", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)


def test_every_proof_is_a_test() -> None:
    page = "\n".join((ROOT / "docs" / file).read_text() for file in ("replaces.md", "guarantees.md"))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 20
    assert {test for test in named if f"def {test}(" not in tests} == set()


def test_each_error_is_on_its_page() -> None:
    page = (ROOT / "docs" / "python-api" / "errors.md").read_text()
    shown = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (yes|no) \|", page, re.MULTILINE)
    classes = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.DynamoRedisError)
    ]
    bases = {errors.DynamoRedisError, errors.StoreError, errors.PlaneError}
    assert set(shown) == {
        (kind.__name__, kind.code, "yes" if kind.retryable else "no") for kind in classes if kind not in bases
    }


def test_each_endpoint_of_the_frontend_is_on_its_page() -> None:
    page = (ROOT / "docs" / "http-api.md").read_text()
    frontend = ROOT / "src" / "dynamo_redis" / "frontend"
    sources = [path.read_text() for path in frontend.glob("*.py")]
    found = [each for source in sources for each in re.findall(r'Route\("([^"]+)"', source)]
    found += re.findall(r'"(/v1/[^"]+)"', (frontend / "apis.py").read_text())
    routes = {path.replace(":path", "") for path in found}
    assert len(routes) > 8
    assert {path for path in routes if f" {path}`" not in page} == set()


def test_each_error_of_the_frontend_is_on_its_page() -> None:
    page = (ROOT / "docs" / "http-api.md").read_text()
    sources = [path.read_text() for path in (ROOT / "src" / "dynamo_redis" / "frontend").rglob("*.py")]
    codes = {code for source in sources for code in re.findall(r'code="(\w+)"', source)}
    assert len(codes) > 10
    assert {code for code in codes if f"`{code}`" not in page} == set()


def test_log_lines_for_operators_are_in_the_code() -> None:
    """Each part of a line between two `…` is in a literal of the package."""
    page = (ROOT / "docs" / "operations.md").read_text().partition("## At 3 a.m.")[2]
    cells = re.findall(r"^\| (.+?) \|", page, re.MULTILINE)[1:]
    lines = [
        line.strip() for cell in cells for line in re.findall(r"``(.+?)``|`(.+?)`", cell) for line in line
    ]
    parts = {part.strip(" `").removeprefix("is not ") for line in lines for part in line.split("…")}
    literals = [
        node.value
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(parts) > 20
    assert {part for part in parts if not any(part in literal for literal in literals)} == set()


def test_modules_in_the_architecture_exist() -> None:
    """In its diagrams and tables; the tables of tasks name modules from the packages of their headings on."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "src" / "dynamo_redis"
    folders = "|".join(sorted(path.name for path in package.iterdir() if path.is_dir()))
    named = set(re.findall(rf"(?<![\w/])(?:{folders})(?:/\w+)+", page.replace("src/dynamo_redis/", "")))
    for section in (
        page.partition("## Long-lived tasks")[2].partition("## Shutting down")[0].split("### ")[1:]
    ):
        packages = [package / name for name in re.findall(r"`([\w/]+)/`", section.splitlines()[0])]
        for cell in re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE):
            for module in re.findall(r"[(,] ?`([a-z_]+(?:/[a-z_]+)*)`", cell):
                assert any(is_module(place / module) for place in (*packages, package)), module
    assert len(named) > 30
    assert [path for path in sorted(named) if not is_module(package / path)] == []


def is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").exists()


def test_each_decision_has_a_number_of_its_own() -> None:
    """Gaps are fine: records are written side by side, under numbers taken before."""
    pages = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    numbers = [int(path.name[:4]) for path in pages]
    assert len(set(numbers)) == len(numbers) > 50
    for path, number in zip(pages, numbers, strict=True):
        assert path.read_text().startswith(f"# {number}. "), path.name


def test_each_decision_is_in_the_index() -> None:
    """By its number, its title and its file."""
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    for path in sorted(folder.glob("0*.md")):
        number, _, title = path.read_text().splitlines()[0].removeprefix("# ").partition(". ")
        assert f"| {number} | [{title}]({path.name}) |" in index


def test_modules_in_the_decisions_exist() -> None:
    """And the classes and functions behind their dots."""
    package = ROOT / "src" / "dynamo_redis"
    folders = "|".join(sorted(path.name for path in package.iterdir() if path.is_dir()))
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "decisions").glob("0*.md"))
    named = set(re.findall(rf"`((?:{folders})(?:/\w+)+)(?:\.(\w+))?`", pages))
    assert len(named) > 10
    for module, member in sorted(named):
        assert is_module(package / module), module
        if member not in ("", "py"):
            assert member in (package / module).with_suffix(".py").read_text(), f"{module}.{member}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_figures_are_the_measured_ones(page: Path) -> None:
    """`python -m benchmarks.pages` brings them up to date."""
    text = page.read_text()
    assert updated(text, results(), lines()) == text


def test_each_figure_of_the_readme_names_its_row() -> None:
    """Every number of a row that shows a figure, but for those of its conditions."""
    text = (ROOT / "README.md").read_text()
    rows = [line for line in text.splitlines() if MARK.search(line)]
    assert sum(len(MARK.findall(row)) for row in rows) > 10
    for row in rows:
        assert set(re.findall(r"\d[\d,]*(?:\.\d+)?", MARK.sub("", row))) <= CONDITIONS


def test_the_first_sentence_of_the_readme_is_short() -> None:
    sentence = (ROOT / "README.md").read_text().split("\n\n")[1]
    assert sentence.count(". ") == 0
    assert len(sentence.split()) <= 25


def test_each_measured_row_is_shown() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert [line for line in lines().values() if line not in page] == []


def test_table_of_replays_has_the_measured_figures() -> None:
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
