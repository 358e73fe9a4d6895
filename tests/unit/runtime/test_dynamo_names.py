"""The page lists every name of `dynamo.runtime`, and each name that it claims exists."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis import llm, runtime
from dynamo_redis.llm import exceptions
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.instance import Transport

HERE: dict[str, type[Any]] = {
    "Client": runtime.Client,
    "Context": Context,
    "ContextMetadata": dict,
    "DistributedRuntime": runtime.DistributedRuntime,
    "Endpoint": runtime.Endpoint,
    "Instance": runtime.Instance,
    "KvEventPublisher": llm.KvEventPublisher,
    "ModelInput": llm.ModelInput,
    "ModelRuntimeConfig": llm.ModelRuntimeConfig,
    "ModelType": llm.ModelType,
    "OverlapScores": llm.OverlapScores,
    "PyAsyncRequestStream": runtime.PyAsyncRequestStream,
    "RadixTree": llm.RadixTree,
    "TransportType": Transport,
    "WorkerMetricsPublisher": llm.WorkerMetricsPublisher,
    "WorkerType": llm.WorkerType,
}

Parameters = list[str] | None
"""None for an attribute."""


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    path = Path(__file__).parents[2] / "vectors" / "dynamo_runtime_names.json"
    loaded = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def table() -> dict[str, str]:
    """Return the page's entry for each name: yes, differs or no."""
    page = (Path(__file__).parents[3] / "docs" / "dynamo-names.md").read_text(encoding="utf-8")
    said: dict[str, str] = {}
    for cell, verdict in re.findall(r"^\| (`[^|]+`) \| (yes|differs|no) \|", page, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", cell):
            assert name not in said, f"{name} has two rows"
            said[name] = verdict
    return said


def wanted(names: dict[str, Any]) -> dict[str, Parameters]:
    """Return the rows that the page must have: one a function, one a missing class, one a member."""
    rows: dict[str, Parameters] = dict(names["functions"])
    for cls, members in names["classes"].items():
        rows |= {f"{cls}.{name}": of for name, of in members.items()} if cls in HERE else {cls: None}
    return rows


def test_every_name_has_its_row(names: dict[str, Any], table: dict[str, str]) -> None:
    assert set(wanted(names)) == set(table)


def test_table_has_existing_names_only(names: dict[str, Any], table: dict[str, str]) -> None:
    for name, parameters in wanted(names).items():
        cls, _, member = name.partition(".")
        if not member:
            home = llm if hasattr(llm, name) else exceptions
            assert (table[name] != "no") == hasattr(home, name), name
            if table[name] == "yes" and parameters is not None:
                assert list(inspect.signature(getattr(home, name)).parameters) == parameters, name
            continue
        if table[name] == "no":
            assert not hasattr(HERE[cls], member), f"{name} is here"
            continue
        assert hasattr(HERE[cls], member) or member in HERE[cls].__annotations__, f"{name} is missing"
        if table[name] == "yes" and parameters is not None and HERE[cls] is not dict:
            own = [p for p in inspect.signature(getattr(HERE[cls], member)).parameters if p != "self"]
            positional = own[: len(parameters)]
            assert set(parameters) <= set(own) if member == "publish" else positional == parameters, name


def test_runtime_takes_all_arguments_of_dynamo(names: dict[str, Any]) -> None:
    own = list(inspect.signature(runtime.DistributedRuntime.__init__).parameters)[1:]
    theirs = names["classes"]["DistributedRuntime"]["__init__"]
    assert own[: len(theirs)] == theirs


def test_list_matches_the_installed_wheel(names: dict[str, Any]) -> None:
    """If the wheel is installed. A later release may have more names."""
    try:
        core = importlib.import_module("dynamo._core")
    except ImportError:
        pytest.skip("ai-dynamo-runtime is not installed")
    for cls, members in names["classes"].items():
        if cls in HERE:
            missing = {name for name in members if not hasattr(getattr(core, cls), name)}
            assert not missing, f"{cls} has no {missing}"
