"""Answers of the real `ai-dynamo-runtime`, for tests that compare: one JSON line in, one JSON line out.

Run by an interpreter that has the package. A line is `["names", module]`, `["hashes", [arguments…]]` or
`["tree", [steps…]]`; a step is `["apply", worker, event]`, `["find", sequence, early_exit]`,
`["remove_worker", worker]`, `["clear", worker]` or `["dump"]`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from typing import Any


def names(module: Any) -> dict[str, Any]:
    """Return the public names of a module: parameters of functions, and of the members of classes."""
    found: dict[str, Any] = {}
    for name in sorted(vars(module)):
        value = getattr(module, name)
        if name.startswith("_") or name in ("TYPE_CHECKING", "annotations", "logger"):
            continue
        if name not in getattr(module, "__all__", ()) and not _is_of(value, module.__name__):
            continue
        found[name] = {"parameters": parameters(value)}
        if isinstance(value, type) and not issubclass(value, Exception):
            members = (member for member in dir(value) if not member.startswith("_"))
            found[name]["members"] = {member: parameters(getattr(value, member)) for member in members}
    return found


def _is_of(value: Any, module: str) -> bool:
    """Return whether a class or function is of the module. Those of `_core` do not say where they are."""
    home = getattr(value, "__module__", None) or "builtins"
    if module.startswith("dynamo.common"):
        return bool(home == module)
    return callable(value) and home.startswith(("builtins", "dynamo", "_core", "backend"))


def parameters(value: Any) -> list[str] | None:
    """Return the names of a function's parameters; None if it has none to tell of."""
    try:
        return [name for name in inspect.signature(value).parameters if name != "self"]
    except (TypeError, ValueError):
        return None


def hashes(llm: Any, arguments: list[Any]) -> Any:
    try:
        return llm.compute_block_hash_for_seq(*arguments)
    except Exception as exc:  # noqa: BLE001 - the error is the answer
        return type(exc).__name__


def tree(llm: Any, steps: list[Any]) -> list[Any]:
    made = llm.RadixTree()
    return [_step(made, *step) for step in steps]


def _step(made: Any, kind: str, *arguments: Any) -> Any:
    if kind == "find":
        scores = made.find_matches(*arguments).scores
        return sorted([*worker, score] for worker, score in scores.items())
    if kind == "dump":
        dumped = [json.loads(event) for event in made.dump_tree_as_events()]
        for event in dumped:
            event["event"]["event_id"] = 0  # their order is that of a hash map
        return sorted(dumped, key=json.dumps)
    try:
        if kind == "apply":
            worker, event = arguments
            made.apply_event(worker, json.dumps(event).encode())
        elif kind == "remove_worker":
            made.remove_worker(*arguments)
        else:
            made.clear_all_blocks(*arguments)
    except Exception as exc:  # noqa: BLE001 - the error is the answer
        return f"{type(exc).__name__}: {exc}"
    return None


def answer(llm: Any, kind: str, *arguments: Any) -> Any:
    if kind == "names":
        return names(importlib.import_module(*arguments))
    return hashes(llm, *arguments) if kind == "hashes" else tree(llm, *arguments)


if __name__ == "__main__":
    import dynamo.llm

    for line in sys.stdin:
        print(json.dumps(answer(dynamo.llm, *json.loads(line))), flush=True)
