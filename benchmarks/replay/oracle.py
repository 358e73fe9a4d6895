"""Compares the routers' indexes with the engines' caches.

Both sides write, into a directory of their own, a file for each instance with the sequence hashes of its
blocks: u64, in this machine's byte order, sorted.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.replay.figures import Outcome


def write_blocks(directory: Path, instance_id: int, blocks: Collection[int]) -> None:
    """Write the blocks of one instance."""
    (directory / f"{instance_id:x}").write_bytes(array("Q", sorted(blocks)).tobytes())


def read_blocks(directory: Path) -> dict[int, set[int]]:
    """Return the blocks of each instance; instances without blocks are left out."""
    return {
        int(path.name, 16): set(array("Q", content))
        for path in directory.iterdir()
        if (content := path.read_bytes())
    }


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between an index and the caches."""

    block_count: int
    """Blocks in the caches, counted for each worker."""
    missing_count: int
    """Blocks of these that the router does not know of."""
    wrong_count: int
    """Blocks that the router believes in and that are not there."""

    @property
    def equal(self) -> bool:
        return not (self.missing_count or self.wrong_count)


def difference(index: Mapping[int, set[int]], truth: Mapping[int, set[int]]) -> Difference:
    """Return the difference, over all instances that either side knows."""
    nothing: set[int] = set()
    instances = index.keys() | truth.keys()
    return Difference(
        block_count=sum(map(len, truth.values())),
        missing_count=sum(len(truth.get(one, nothing) - index.get(one, nothing)) for one in instances),
        wrong_count=sum(len(index.get(one, nothing) - truth.get(one, nothing)) for one in instances),
    )


def wrong_share(outcomes: Sequence[Outcome]) -> float:
    """Return the prompt tokens that routers believed cached and workers did not find ÷ those that they
    believed cached.

    A hit is counted only by the worker's report. A block that was evicted between the choice and the
    request's turn counts here, too.
    """
    thought = sum(outcome.matched_count for outcome in outcomes)
    wrong = sum(max(outcome.matched_count - outcome.cached_count, 0) for outcome in outcomes)
    return wrong / thought if thought else 0.0
