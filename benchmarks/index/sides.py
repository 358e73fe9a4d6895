"""The two sides of suite `index`: ours in this process, Dynamo's tree in one of its own, on equal chats.

Ours is fed as a router is: stored batches of one publisher each → `EventBatch` → the ledger's check for gaps
and repetitions → `KvIndex`. Dynamo's is fed by its Python binding, `RadixTree.apply_event`, with the JSON of
one event a call, the only form that it takes. Both are queried by hashes, not by tokens.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from benchmarks.harness.processes import DYNAMO, Driver, driver, rival_python
from benchmarks.index.workload import Block, Event, Scene, digest
from dynamo_redis.router.base import Worker
from dynamo_redis.router.index.ledger import Ledger
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.wire.event import EventBatch, PublisherId
from dynamo_redis.wire.kv_event import DEVICE, REMOVED, STORED, KvEvent
from dynamo_redis.wire.topics import KV_EVENTS

BATCH_EVENTS = 32
"""Events of an entry: those of a busy worker within the publisher's linger."""


def to_batches(events: Iterable[Event], batch_events: int = BATCH_EVENTS) -> Iterator[bytes]:
    """Return events as their workers' publishers would have stored them, in the order in which batches become
    full."""
    waiting: dict[int, list[list[object]]] = {}
    sequences: dict[int, int] = {}

    def batch(worker: int) -> bytes:
        ready = waiting.pop(worker)
        first = sequences.get(worker, 0)
        sequences[worker] = first + len(ready)
        return EventBatch(KV_EVENTS, PublisherId(worker, 1, 0), first, 0, ready).to_bytes()

    for event in events:
        mine = waiting.setdefault(event.worker, [])
        mine.append(to_kv_event(event).to_wire())
        if len(mine) == batch_events:
            yield batch(event.worker)
    yield from map(batch, list(waiting))


def to_kv_event(event: Event) -> KvEvent:
    """Convert a worker's event into ours."""
    hashes = array("Q", (block.sequence for block in event.blocks))
    return KvEvent(STORED if event.stored else REMOVED, DEVICE, hashes)


def indexed(batches: Iterable[bytes]) -> KvIndex:
    """Return the index of a router that has applied these batches."""
    ledger = Ledger(KvIndex())
    read, apply = EventBatch.from_bytes, ledger.apply
    for batch in batches:
        apply(read(batch))
    if not ledger.applied_count or ledger.repeated_count:
        raise RuntimeError("not all events were applied")
    return ledger.index


class Ours:
    """Our index, timed."""

    def __init__(self, shown: Scene) -> None:
        self._blocks_count = sum(len(event.blocks) for event in shown.events)
        self._batches = list(to_batches(shown.events))
        self._lone_batches = list(to_batches(shown.events, 1))
        self._index = indexed(self._batches)
        for event in shown.readings:
            self._index.apply(Worker(event.worker), [to_kv_event(event)])

    def apply(self, *, batched: bool = True) -> float:
        """Return the blocks/s from stored bytes to an index."""
        batches = self._batches if batched else self._lone_batches
        began = time.perf_counter()
        index = indexed(batches)
        took_s = time.perf_counter() - began
        del index  # outside the measured time
        return self._blocks_count / took_s

    def find(self, prompts: Sequence[list[Block]], repeats: int) -> float:
        """Return the microseconds of a find."""
        asked = [[block.sequence for block in prompt] for prompt in prompts]
        find = self._index.find
        began = time.perf_counter()
        for _ in range(repeats):
            deque(map(find, asked), maxlen=0)
        return 1e6 * (time.perf_counter() - began) / (repeats * len(asked))

    def digest(self, prompts: Sequence[list[Block]]) -> str:
        """Return a digest of its answers to all prompts."""
        found = (self._index.find([block.sequence for block in prompt]) for prompt in prompts)
        return digest({worker.instance_id: held.device for worker, held in one.items()} for one in found)


class Tree:
    """Dynamo's tree, at the other end of a pipe."""

    def __init__(self, process: Driver) -> None:
        self._process = process

    def apply(self) -> float:
        """Return the blocks/s from JSON to a tree."""
        return float(self._ask("apply"))

    def find(self, what: str, repeats: int, *, scores: bool = True) -> float:
        """Return the microseconds of a find; with `scores` until the answer is a dict."""
        return float(self._ask(f"find {what} {repeats} {int(scores)}"))

    def digest(self, what: str) -> str:
        """Return a digest of its answers to all prompts."""
        return self._ask(f"digest {what}")

    def _ask(self, line: str) -> str:
        self._process.send(line)
        return self._process.answer()


def tree_python() -> str:
    """Return the interpreter of Dynamo's environment, which is made on first use."""
    return rival_python("dynamo", DYNAMO, "uvloop")


@contextmanager
def tree() -> Iterator[Tree]:
    """Run the rival with the same chats applied until the block ends."""
    quiet = {"DYN_LOG": "off", "DYNAMO_SKIP_PYTHON_LOG_INIT": "1"}
    with driver(tree_python(), "index.rivals.radix_tree", environment=quiet) as process:
        process.answer()
        yield Tree(process)
