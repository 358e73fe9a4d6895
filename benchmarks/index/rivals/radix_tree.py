"""Dynamo's `RadixTree`, led by lines: `apply`, `find WHAT REPEATS SCORES`, `digest WHAT`.

Runs in Dynamo's own environment, for `index/sides.py`.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import deque
from collections.abc import Sequence

from dynamo.llm import RadixTree

from benchmarks.index.workload import Block, Event, Scene, digest, scene


def wire(number: int, event: Event) -> bytes:
    """Return an event as the binding takes it."""
    if event.stored:
        blocks = [{"block_hash": block.sequence, "tokens_hash": block.local} for block in event.blocks]
        data: dict[str, object] = {"stored": {"parent_hash": event.parent, "blocks": blocks}}
    else:
        data = {"removed": {"block_hashes": [block.sequence for block in event.blocks]}}
    return json.dumps({"event_id": number, "data": data, "dp_rank": 0}).encode()


def applied(events: Sequence[tuple[int, bytes]]) -> RadixTree:
    """Return a tree to which all events have been applied."""
    tree = RadixTree()
    apply_event = tree.apply_event
    for worker, content in events:
        apply_event(worker, content)
    tree.find_matches([0])  # returns after the last event of the tree's own queue
    return tree


def find(tree: RadixTree, prompts: Sequence[list[Block]], repeats: int, scores: bool) -> float:
    """Return the microseconds of a find."""
    asked = [[block.local for block in prompt] for prompt in prompts]
    began = time.perf_counter()
    if scores:
        for _ in range(repeats):
            deque((tree.find_matches(prompt).scores for prompt in asked), maxlen=0)
    else:
        for _ in range(repeats):
            deque(map(tree.find_matches, asked), maxlen=0)
    return 1e6 * (time.perf_counter() - began) / (repeats * len(asked))


def prompts_of(shown: Scene, what: str) -> list[list[Block]]:
    """Return the prompts of a row."""
    return shown.prompts if what == "prompts" else shown.documents


def main() -> None:
    """Carry out the commands until the input ends."""
    shown = scene()
    events = [(event.worker, wire(number, event)) for number, event in enumerate(shown.events)]
    blocks = sum(len(event.blocks) for event in shown.events)
    tree = applied(events)
    for number, event in enumerate(shown.readings):
        tree.apply_event(event.worker, wire(number, event))
    gc.collect()
    gc.freeze()  # the garbage collector need not walk the scene, which a router does not have
    print("ready", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["apply"]:
                began = time.perf_counter()
                other = applied(events)
                answer = f"{blocks / (time.perf_counter() - began)}"
                del other  # outside the measured time
            case ["find", what, repeats, scores]:
                answer = f"{find(tree, prompts_of(shown, what), int(repeats), scores == '1')}"
            case ["digest", what]:
                found = (
                    tree.find_matches([block.local for block in prompt]).scores
                    for prompt in prompts_of(shown, what)
                )
                answer = digest({worker: count for (worker, _), count in one.items()} for one in found)
            case _:
                raise ValueError(line)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
