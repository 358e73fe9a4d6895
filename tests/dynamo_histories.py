"""Questions for `RadixTree` and `compute_block_hash_for_seq`: of this package, and of the real one.

    python -m tests.dynamo_histories PYTHON > tests/vectors/dynamo_llm.json

asks the real package, which the interpreter PYTHON has, and prints the answers for tests without it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

PROGRAM = Path(__file__).parent / "programs" / "dynamo_answers.py"
ORIGIN = "the answers of ai-dynamo-runtime and ai-dynamo 1.6.1, made by tests/dynamo_histories.py"
TREES, HASHES = 30, 40
MODULES = (
    "dynamo._core",
    "dynamo.runtime",
    "dynamo.runtime.logging",
    "dynamo.llm",
    "dynamo.llm.exceptions",
    "dynamo.common.backend",
    "dynamo.common.backend.engine",
    "dynamo.common.backend.worker",
    "dynamo.common.backend.run",
    "dynamo.common.backend.publisher",
    "dynamo.common.backend.metrics",
    "dynamo.common.backend.telemetry",
    "dynamo.common.backend.health_check",
    "dynamo.common.backend.disagg",
    "dynamo.common.backend.dp_rank",
    "dynamo.common.constants",
)
"""The modules whose names are stored. Those of `dynamo.common` are in the package `ai-dynamo`."""


Question = list[Any]


def tree_question(random: Random) -> Question:
    """Return a history of a tree. Half of them have engines that give a hash twice."""
    hashes: dict[tuple[int, ...], int] = {}
    is_sane = random.random() < 0.5
    steps: list[Any] = []

    def hash_of(path: list[int]) -> int:
        key = tuple(path) if is_sane or random.random() < 0.9 else (random.randint(0, 9),)
        return hashes.setdefault(key, 100 + len(hashes))

    def stored() -> dict[str, Any]:
        path = [random.randint(1, 3) for _ in range(random.randint(1, 6))]
        start = random.choice([0, 0, random.randint(0, len(path) - 1)])
        blocks = [
            {"block_hash": hash_of(path[: end + 1]), "tokens_hash": path[end]}
            for end in range(start, len(path))
        ]
        return {"stored": {"parent_hash": hash_of(path[:start]) if start else None, "blocks": blocks}}

    for _ in range(random.randint(1, 12)):
        worker, kind = random.randint(1, 3), random.random()
        data: Any = "cleared"
        if kind < 0.6:
            data = stored()
        elif kind < 0.85 and hashes:
            some = [random.choice(list(hashes.values())) for _ in range(random.randint(1, 3))]
            data = {"removed": {"block_hashes": some}}
        event = {"event_id": 1, "dp_rank": random.choice([0, 0, 0, 1]), "data": data}
        steps.append(["apply", worker, event] if kind < 0.9 else ["remove_worker", worker])
        if kind >= 0.95:
            steps.append(["clear", worker])
        steps.append(["find", [random.randint(1, 3) for _ in range(6)], random.random() < 0.3])
    return ["tree", [*steps, ["dump"]]]


def _event(data: Any) -> list[Any]:
    return ["apply", 1, {"event_id": 1, "data": data}]


def _stored(parent: int | None, *hashes: int) -> list[Any]:
    """Return the storing of blocks whose hashes and tokens are the same number."""
    blocks = [{"block_hash": number, "tokens_hash": number} for number in hashes]
    return _event({"stored": {"parent_hash": parent, "blocks": blocks}})


def _removed(*hashes: int) -> list[Any]:
    return _event({"removed": {"block_hashes": hashes}})


RARE: list[Question] = [
    # a block that was removed before those in front of it is not known any more
    ["tree", [_stored(None, 1, 2, 3), _removed(3), _removed(1, 2, 3), ["dump"]]],
    # an edge that no worker holds is replaced, not covered again
    ["tree", [_stored(None, 1, 2), _event("cleared"), _stored(None, 1), _stored(1, 6, 7), _removed(7),
              ["dump"]]],
    # a block removed from the middle and stored again brings those behind it back only in another edge
    ["tree", [_stored(None, 1, 2, 3), _removed(2), _stored(1, 2), ["find", [1, 2, 3], False]]],
    ["tree", [_stored(None, 1, 2), _stored(2, 3), _stored(2, 4), _removed(2), _stored(1, 2),
              ["find", [1, 2, 3], False], ["dump"]]],
]  # fmt: skip
"""Histories that are seldom drawn."""


def hash_question(random: Random) -> Question:
    """Return arguments of `compute_block_hash_for_seq`."""
    tokens = [random.randint(0, (1 << 32) - 1) for _ in range(random.randint(0, 20))]
    media = [
        random.choice([None, {"mm_objects": [_medium(random) for _ in range(random.randint(0, 3))]}])
        for _ in range(random.randint(0, 4))
    ]
    names = [None, "", "lora", "ü"]
    eagle = random.choice([None, False, True])
    arguments = [tokens, random.randint(0, 5), random.choice([None, media]), random.choice(names), eagle]
    return ["hashes", [*arguments, random.choice(names)]]


def _medium(random: Random) -> dict[str, Any]:
    return {"mm_hash": random.randint(0, (1 << 64) - 1), "offsets": []}


class Asker:
    """A process of the real package."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, question: Question) -> Any:
        """Return the real answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def asker(python: str) -> Iterator[Asker]:
    """Start the real package in the interpreter `python`, and end it."""
    command = [python, str(PROGRAM)]
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=none, text=True) as process:
        try:
            yield Asker(process)
        finally:
            process.kill()


def _lines(names: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(names[name])}" for name in names) + "\n}"


def main() -> None:
    random = Random(1)
    questions = [*RARE, *(tree_question(random) for _ in range(TREES))]
    questions += [hash_question(random) for _ in range(HASHES)]
    with asker(sys.argv[1]) as real:
        answers = [real.ask(question) for question in questions]
        modules = {module: real.ask(["names", module]) for module in MODULES}
    sys.stdout.write('{\n"origin": ' + json.dumps(ORIGIN) + ',\n"modules": {\n')
    sys.stdout.write(",\n".join(f"{json.dumps(module)}: {_lines(modules[module])}" for module in modules))
    sys.stdout.write('\n},\n"answers": [\n')
    pairs = zip(questions, answers, strict=True)
    sys.stdout.write(",\n".join(json.dumps(pair, separators=(",", ":")) for pair in pairs))
    sys.stdout.write("\n]\n}\n")


if __name__ == "__main__":
    main()
