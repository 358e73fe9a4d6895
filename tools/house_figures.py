"""Figures of how the code reads: `python tools/house_figures.py [DIRECTORY]`.

Prints files a folder, private helpers that are used once, first words of docstrings, words that name
processes as if they were persons, and lengths of test names, of a checkout of this project.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CODE = ("src", "benchmarks", "faults", "tests", "examples", "tools")
QUESTION_WORDS = ("What", "Who", "Whom", "Whose")
PERSONS = re.compile(r"\b(?:nobody|somebody|whoever|whomever)\b", re.IGNORECASE)
TEST_NAME_LENGTH = 60
Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(root: Path, *folders: str) -> Iterator[tuple[Path, ast.Module]]:
    """Yield all Python files below these folders, parsed."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def question_docstrings(root: Path) -> list[str]:
    """Return `file:line` of each docstring that begins with a question word."""
    found = []
    for path, module in modules(root, *CODE):
        for node in ast.walk(module):
            if isinstance(node, ast.Module | ast.ClassDef | Function):
                text = ast.get_docstring(node) or ""
                if text.split(maxsplit=1)[:1] and text.split(maxsplit=1)[0].rstrip(",") in QUESTION_WORDS:
                    found.append(f"{path.relative_to(root)}:{getattr(node, 'lineno', 1)}")
    return found


def docstring_count(root: Path) -> int:
    """Count all docstrings."""
    kinds = ast.Module | ast.ClassDef | Function
    return sum(
        isinstance(node, kinds) and ast.get_docstring(node) is not None
        for _, module in modules(root, *CODE)
        for node in ast.walk(module)
    )


def texts(root: Path) -> Iterator[Path]:
    """Yield every file with prose: code, scripts and pages."""
    for folder in (*CODE, "docs"):
        for pattern in ("*.py", "*.lua", "*.md"):
            yield from sorted((root / folder).rglob(pattern))
    yield from sorted(root.glob("*.md"))


def persons(root: Path) -> tuple[int, int]:
    """Count the words for persons in the prose, and all its words."""
    hits = words = 0
    for path in texts(root):
        text = path.read_text(encoding="utf-8")
        hits += len(PERSONS.findall(text))
        words += len(re.findall(r"[A-Za-z]+", text))
    return hits, words


def long_test_names(root: Path) -> list[str]:
    """Return the names of tests that are longer than `TEST_NAME_LENGTH`."""
    return [name for name in test_names(root) if len(name) > TEST_NAME_LENGTH]


def test_names(root: Path) -> list[str]:
    """Return the names of all tests."""
    return [
        node.name
        for _, module in modules(root, "tests")
        for node in ast.walk(module)
        if isinstance(node, Function) and node.name.startswith("test_")
    ]


def single_use_helpers(root: Path) -> tuple[int, int]:
    """Count the private functions of the package that are named once beside their definition, and all
    functions of the package."""
    once = functions = 0
    for _, module in modules(root, "src"):
        names = Counter(node.attr for node in ast.walk(module) if isinstance(node, ast.Attribute))
        names.update(node.id for node in ast.walk(module) if isinstance(node, ast.Name))
        for node in ast.walk(module):
            if isinstance(node, Function):
                functions += 1
                is_private = node.name.startswith("_") and not node.name.startswith("__")
                once += is_private and names[node.name] == 1
    return once, functions


def folder_sizes(root: Path) -> Counter[str]:
    """Count the modules of each folder of the package and of the benchmarks."""
    return Counter(
        str(path.parent.relative_to(root))
        for folder in ("src", "benchmarks")
        for path in (root / folder).rglob("*.py")
        if path.name != "__init__.py"
    )


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    once, functions = single_use_helpers(root)
    hits, words = persons(root)
    names = test_names(root)
    print("files a folder:", *(f"{folder} {count}" for folder, count in folder_sizes(root).most_common(6)))
    print(f"private helpers used once: {once} of {functions} functions, {100 * once / functions:.1f} %")
    asking = len(question_docstrings(root))
    print(f"docstrings that begin with a question word: {asking} of {docstring_count(root)}")
    print(f"words for persons: {hits}, {1000 * hits / words:.2f} a 1,000 words")
    print(
        f"test names: {len(names)}, median {statistics.median(map(len, names)):.0f} characters,"
        f" {len(long_test_names(root))} over {TEST_NAME_LENGTH}, longest {max(map(len, names))}"
    )


if __name__ == "__main__":
    main()
