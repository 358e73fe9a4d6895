"""X1 to X3: our index and Dynamo's tree, in turn, after both have given equal answers."""

from __future__ import annotations

import gc

from benchmarks.harness.report import Measured, median
from benchmarks.index.sides import Ours, tree
from benchmarks.index.workload import scene

PROMPT_REPEATS = 20
DOCUMENT_REPEATS = 40


def rivalry(rounds: int) -> dict[str, Measured]:
    """Measure X1 in blocks/s, X2 and X3 in µs a find."""
    shown = scene()
    ours = Ours(shown)
    figures: dict[str, list[tuple[float, float]]] = {"X1": [], "X2": [], "X3": []}
    aside: dict[str, list[float]] = {"one event a batch": [], "X2 bare": [], "X3 bare": []}
    gc.collect()
    gc.freeze()  # the garbage collector need not walk the scene, which a router does not have
    with tree() as rival:
        for what, prompts in (("prompts", shown.prompts), ("documents", shown.documents)):
            if ours.digest(prompts) != rival.digest(what):
                raise RuntimeError(f"the sides find different blocks in {what}")
        for _ in range(rounds):
            figures["X1"].append((ours.apply(), rival.apply()))
            figures["X2"].append(
                (ours.find(shown.prompts, PROMPT_REPEATS), rival.find("prompts", PROMPT_REPEATS))
            )
            figures["X3"].append(
                (ours.find(shown.documents, DOCUMENT_REPEATS), rival.find("documents", DOCUMENT_REPEATS))
            )
            aside["one event a batch"].append(ours.apply(batched=False))
            aside["X2 bare"].append(rival.find("prompts", PROMPT_REPEATS, scores=False))
            aside["X3 bare"].append(rival.find("documents", DOCUMENT_REPEATS, scores=False))
    lone, prompts_us, documents_us = (median(values) for values in aside.values())
    print(f"X1 with one event a batch: {lone:g} blocks/s", flush=True)
    print(f"X2, X3: the rival without reading its answer: {prompts_us:g}, {documents_us:g} µs", flush=True)
    return {
        name: Measured.against([ours for ours, _ in pairs], [rival for _, rival in pairs], costs=name != "X1")
        for name, pairs in figures.items()
    }
