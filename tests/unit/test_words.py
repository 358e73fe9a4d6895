"""The words that code, tests and pages are written in, held by the figures of `tools/house_figures.py`."""

from __future__ import annotations

from pathlib import Path

from tools.house_figures import long_test_names, persons, question_docstrings


def test_no_docstring_begins_with_a_question_word(repository: Path) -> None:
    assert question_docstrings(repository) == []


def test_processes_are_not_called_persons(repository: Path) -> None:
    hits, words = persons(repository)
    assert hits <= words / 10_000


def test_names_of_tests_are_short(repository: Path) -> None:
    assert long_test_names(repository) == []
