"""A suite refuses at once an option that it cannot measure."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from benchmarks.harness.options import length_s, rounds_count
from benchmarks.index import __main__ as index
from benchmarks.registry import __main__ as registry
from benchmarks.request import __main__ as request


@pytest.mark.parametrize(
    ("suite", "arguments"),
    [
        (request, "--rounds 0"),
        (request, "--rounds many"),
        (request, "--seconds -1"),
        (request, "--seconds 0"),
        (request, "--seconds nan"),
        (request, "--seconds inf"),
        (registry, "--rounds -2"),
        (index, "--rounds 0.5"),
    ],
)
def test_bad_options_are_refused(
    suite: ModuleType, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    option, value = arguments.split()
    monkeypatch.setattr(sys, "argv", ["suite", option, value])
    with pytest.raises(SystemExit, match="2"):
        suite.main()
    assert f"argument {option}: '{value}' is not a" in capsys.readouterr().err


def test_good_options_are_accepted() -> None:
    assert (rounds_count("3"), length_s("0.5")) == (3, 0.5)
