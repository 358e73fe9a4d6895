"""X4 and X5: the cost of a choice beside the hashing that it needs, and the part that more workers add.

A choice is all that a router does for a request in its own process: hash the prompt's 4,096 tokens in blocks
of 16, find the workers that hold a part of it, weigh all workers, and book the load. Freeing the load is part
of the figure too.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable

from benchmarks.harness.report import Measured
from dynamo_redis.events.block_hashes import chain, local_hashes, pack_names
from dynamo_redis.router.base import CostWeights, Worker
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.selector import Selector
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.wire.kv_event import stored

TOKENS = 4096
BLOCK_SIZE = 16
BLOCKS = TOKENS // BLOCK_SIZE
SYSTEM_BLOCKS = 24
PROMPTS = 64
READERS = 2
REQUESTS_A_WORKER = 4
VOCABULARY = 150_000
REPEATS = 10


class Router:
    """The pure half of a router. All workers and their running requests share a system prompt; some workers
    have read each prompt."""

    def __init__(self, workers: int) -> None:
        rng = random.Random(7)
        self._workers = [Worker(number) for number in range(workers)]
        self._index = KvIndex()
        self.book = LoadBook()
        self._selector = Selector(random.Random(8))
        self._weights = CostWeights()
        system = rng.choices(range(VOCABULARY), k=SYSTEM_BLOCKS * BLOCK_SIZE)
        self._prompts = [
            array("I", system + rng.choices(range(VOCABULARY), k=TOKENS - len(system)))
            for _ in range(PROMPTS)
        ]
        for prompt in self._prompts:
            hashes = chain(local_hashes(prompt, BLOCK_SIZE))
            for worker in self._workers:
                self._index.apply(worker, [stored(hashes[:SYSTEM_BLOCKS])])
            for worker in rng.sample(self._workers, READERS):
                self._index.apply(worker, [stored(hashes[: rng.randrange(SYSTEM_BLOCKS, BLOCKS)])])
        shared = chain(local_hashes(system, BLOCK_SIZE))
        for number in range(workers * REQUESTS_A_WORKER):
            worker = rng.choice(self._workers)
            tokens = rng.randrange(TOKENS)
            own = [rng.getrandbits(64) for _ in range(BLOCKS - SYSTEM_BLOCKS)]
            self.book.add(
                "other",
                str(number),
                worker,
                prefill_tokens=tokens,
                blocks=BLOCKS,
                deadline=1e9,
                names=pack_names(shared + own),
            )

    def hash_all(self) -> None:
        """Hash all prompts."""
        for prompt in self._prompts:
            chain(local_hashes(prompt, BLOCK_SIZE))

    def choose_all(self) -> None:
        """Choose a worker for each prompt."""
        for number, prompt in enumerate(self._prompts):
            hashes = chain(local_hashes(prompt, BLOCK_SIZE))
            names = pack_names(hashes)
            choice = self._selector.select(
                self._workers,
                self._index.find(hashes),
                self.book,
                token_count=TOKENS,
                block_size=BLOCK_SIZE,
                weights=self._weights,
                active=self.book.active(names),
            )
            to_read = TOKENS - BLOCK_SIZE * choice.matched.device
            request_id = str(number)
            self.book.add(
                "own",
                request_id,
                choice.worker,
                prefill_tokens=to_read,
                blocks=BLOCKS,
                deadline=1e9,
                names=names,
            )
            self.book.free("own", request_id)


def choices(rounds: int) -> dict[str, Measured]:
    """Measure X4 and X5, in µs a choice."""
    few, many = Router(64), Router(256)
    hashing, among_few, among_many = [], [], []
    for _ in range(rounds):
        hashing.append(_us(few.hash_all))
        among_few.append(_us(few.choose_all))
        among_many.append(_us(many.choose_all))
    return {"X4": Measured.against(among_few, hashing), "X5": Measured.against(among_many, among_few)}


def _us(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    for _ in range(REPEATS):
        work()
    return 1e6 * (time.perf_counter() - began) / (REPEATS * PROMPTS)
