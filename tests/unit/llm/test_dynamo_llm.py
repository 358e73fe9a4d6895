"""`dynamo_redis.llm` against `dynamo.llm`: its names, and the answers of its hashes and its tree.

With `DYNAMO_PYTHON`, an interpreter that has `ai-dynamo-runtime` 1.6.1, the real package answers too.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dynamo_redis import llm
from tests.dynamo_histories import Asker, asker, hash_question, tree_question
from tests.programs.dynamo_answers import answer

REPOSITORY = Path(__file__).parents[3]
STORED: dict[str, Any] = json.loads(
    (REPOSITORY / "tests" / "vectors" / "dynamo_llm.json").read_text(encoding="utf-8")
)
NAMES: dict[str, Any] = STORED["modules"]["dynamo.llm"]


def own_answer(question: list[Any]) -> Any:
    """Return this package's answer as JSON has it. Where it raises, the type and the reason count: texts of
    ValueErrors are its own."""
    return json.loads(json.dumps(answer(llm, *question)))


def table() -> dict[str, str]:
    """Return the page's entry for each name of `dynamo.llm`: yes, differs or no."""
    page = (REPOSITORY / "docs" / "dynamo-llm-names.md").read_text(encoding="utf-8")
    section = page.split("## `dynamo.llm`", 1)[1].split("\n## ", 1)[0]
    said: dict[str, str] = {}
    for cell, verdict in re.findall(r"^\| (`[^|]+`) \| (yes|differs|no) \|", section, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", cell):
            assert name not in said, f"{name} has two rows"
            said[name] = verdict
    return said


def test_page_has_a_row_for_each_name() -> None:
    assert set(table()) == set(NAMES)


def test_page_says_what_is_here() -> None:
    for name, verdict in table().items():
        assert (verdict != "no") == hasattr(llm, name), name
    assert set(llm.__all__) <= set(NAMES)


@pytest.mark.parametrize("name", [name for name, verdict in table().items() if verdict == "yes"])
def test_name_takes_the_same_parameters(name: str) -> None:
    ours, theirs = getattr(llm, name), NAMES[name]
    if theirs["parameters"] is not None:
        own = [own for own in inspect.signature(ours).parameters if own != "self"]
        missing = set(theirs["parameters"]) - set(own)
        assert missing == set()
    for member, parameters in theirs.get("members", {}).items():
        assert hasattr(ours, member) or member in ours.__annotations__, member
        if parameters is not None:
            own = list(inspect.signature(getattr(ours, member)).parameters)
            assert [one for one in own if one != "self"][: len(parameters)] == parameters, member


def test_answers_are_those_of_dynamo() -> None:
    for question, real in STORED["answers"]:
        assert own_answer(question) == real, question


@pytest.fixture
def real() -> Iterator[Asker]:
    installed = sys.executable if importlib.util.find_spec("dynamo") else None
    python = os.environ.get("DYNAMO_PYTHON") or installed
    if python is None:
        pytest.skip("no DYNAMO_PYTHON, an interpreter with ai-dynamo-runtime")
    with asker(python) as process:
        yield process


def test_new_answers_are_those_of_dynamo(real: Asker) -> None:
    random = Random()
    for _ in range(300):
        for question in (tree_question(random), hash_question(random)):
            assert own_answer(question) == real.ask(question), question


def test_stored_names_are_those_of_dynamo(real: Asker) -> None:
    assert real.ask(["names", "dynamo.llm"]) == NAMES


def test_dumped_tree_makes_an_equal_tree() -> None:
    for seed in range(50):
        _, steps = tree_question(Random(seed))
        tree = llm.RadixTree()
        for kind, *arguments in steps:
            if kind == "apply":
                worker, event = arguments
                try:
                    tree.apply_event(worker, json.dumps(event).encode())
                except RuntimeError:
                    continue
        copy = llm.RadixTree()
        for dumped in map(json.loads, tree.dump_tree_as_events()):
            try:
                copy.apply_event(dumped["worker_id"], json.dumps(dumped["event"]).encode())
            except RuntimeError:  # a block whose parent the worker has removed, which no prompt reaches
                continue
        for question in ([1, 2, 3], [2, 2], [3, 1, 1], [1, 1, 1, 1], [2, 1, 3, 2]):
            assert copy.find_matches(question) == tree.find_matches(question), seed


@pytest.mark.parametrize(
    "event",
    [
        b"x",
        b"{}",
        b"\xff",
        b'{"event_id": -1, "data": "cleared"}',
        b'{"event_id": 1.5, "data": "cleared"}',
        b'{"event_id": 1, "data": "nonsense"}',
        b'{"event_id": 1, "data": "cleared", "dp_rank": 4294967296}',
        b'{"event_id": 1, "data": {"stored": {"blocks": [{"block_hash": 1}]}}}',
        b'{"event_id": 1, "data": {"removed": {"block_hashes": [18446744073709551616]}}}',
        b'{"event_id": 1, "data": {"stored": {"blocks": []}, "removed": {"block_hashes": []}}}',
    ],
)
def test_tree_refuses_what_is_no_event(event: bytes) -> None:
    with pytest.raises(ValueError, match="Failed to deserialize KvCacheEvent"):
        llm.RadixTree().apply_event(1, event)


def test_tree_refuses_other_types() -> None:
    tree, cleared = llm.RadixTree(), b'{"event_id": 1, "data": "cleared"}'
    for worker, event, error in (
        (-1, cleared, OverflowError),
        ("a", cleared, TypeError),
        (1, "s", TypeError),
    ):
        with pytest.raises(error):
            tree.apply_event(worker, event)  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        tree.find_matches([1 << 64])


@pytest.mark.parametrize("info", [{}, "x", {"mm_objects": [{}]}, {"mm_objects": [{"mm_hash": -1}]}, 5])
def test_hashes_refuse_malformed_media(info: Any) -> None:
    with pytest.raises(ValueError, match="block_mm_infos"):
        llm.compute_block_hash_for_seq([1, 2], 2, [info])
