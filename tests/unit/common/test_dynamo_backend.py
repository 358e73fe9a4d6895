"""`dynamo_redis.common` against `dynamo.common` of `ai-dynamo` 1.6.1: its names and their parameters."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from enum import EnumType
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]
MODULES: dict[str, dict[str, Any]] = {
    module: names
    for module, names in json.loads(
        (REPOSITORY / "tests" / "vectors" / "dynamo_llm.json").read_text(encoding="utf-8")
    )["modules"].items()
    if module.startswith("dynamo.common")
}


def left_out() -> dict[str, set[str]]:
    """Return the names of each module that the page says are not here."""
    page = (REPOSITORY / "docs" / "dynamo-llm-names.md").read_text(encoding="utf-8")
    section = page.split("## `dynamo.common.backend`", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(dynamo[\w.]+)` \|[^|]*\|([^|]*)\|", section, re.MULTILINE)
    return {module: set(re.findall(r"`(\w+)`", missing)) for module, missing in rows}


def ours(module: str) -> Any:
    return importlib.import_module(module.replace("dynamo", "dynamo_redis", 1))


def test_page_has_a_row_for_each_module() -> None:
    assert set(left_out()) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_page_says_what_is_missing(module: str) -> None:
    missing = {name for name in MODULES[module] if not hasattr(ours(module), name)}
    assert missing == left_out()[module]


@pytest.mark.parametrize("module", MODULES)
def test_names_take_the_same_parameters(module: str) -> None:
    for name, theirs in MODULES[module].items():
        own = getattr(ours(module), name, None)
        if own is None or not callable(own) or isinstance(own, EnumType):  # Python's own parameters
            continue
        if theirs["parameters"] and not issubclass(own if isinstance(own, type) else int, dict):
            assert parameters(own)[: len(theirs["parameters"])] == theirs["parameters"], name
        for member, wanted in theirs.get("members", {}).items():
            assert hasattr(own, member) or member in own.__annotations__, f"{name}.{member}"
            if wanted is not None and "BaseEngine" in [base.__name__ for base in own.__mro__]:
                assert parameters(getattr(own, member)) == wanted, f"{name}.{member}"


def parameters(value: Any) -> list[str]:
    return [name for name in inspect.signature(value).parameters if name != "self"]


def test_modules_need_no_extras() -> None:
    """A worker of tokens needs neither HTTP nor templates nor ZeroMQ."""
    absent = ("aiohttp", "httptools", "jinja2", "opentelemetry", "starlette", "tokenizers", "uvicorn", "zmq")
    own = [module.replace("dynamo", "dynamo_redis", 1) for module in MODULES]
    lines = [
        "import sys",
        *(f"sys.modules[{name!r}] = None" for name in absent),
        *(f"import {module}" for module in ("dynamo_redis._core", *own)),
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
