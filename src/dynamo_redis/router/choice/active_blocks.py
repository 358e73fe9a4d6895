"""The blocks that the running requests of each worker hold, each block counted once. Pure.

A request holds the blocks of its prompt from the first one on. So the requests of all workers form one tree
of names, in which requests with the same beginning share the upper runs. A *run* is a part of a prompt within
which no two requests differ. It counts the requests that hold it, for each worker. A system prompt that a
thousand requests share is one run, whatever its length, and no operation looks at single blocks:

    hold, release    O(runs of the prompt · log blocks)
    active           the same, and O(workers that hold a part of the prompt)

Prompts are *names*: the sequence hashes of their whole blocks, as `block_hashes.pack_names` packs them. They
are compared in full, so names that are no chain of hashes do no harm.
"""

from __future__ import annotations

from typing import Final

from dynamo_redis.router.base import Worker

NAME_BYTES: Final = 8


class _Run:
    """`names[start:end]`, in bytes. `names` is the prompt of a request that holds, or held, the run."""

    __slots__ = ("children", "count", "end", "holders", "names", "start")

    def __init__(self, names: bytes, start: int, end: int) -> None:
        self.names = names
        self.start = start
        self.end = end
        self.count = 0
        """Number of requests that hold it."""
        self.holders: dict[Worker, int] = {}
        """The same for each worker with such requests."""
        self.children: dict[bytes, _Run] = {}
        """Runs that follow, by their first name."""

    def split(self, at: int) -> None:
        """End the run at `at`; a new run, which the same requests hold, follows it."""
        rest = _Run(self.names, at, self.end)
        rest.count, rest.holders, rest.children = self.count, self.holders.copy(), self.children
        self.end = at
        self.children = {_name(self.names, at): rest}

    def join_only_child(self) -> None:
        """Append the run that follows, if it is the only one and all requests hold it."""
        if len(self.children) == 1:
            (child,) = self.children.values()
            if child.count == self.count:
                self.names, self.end, self.children = child.names, child.end, child.children


class ActiveBlocks:
    """The blocks that running requests hold, by worker."""

    def __init__(self) -> None:
        self._first: dict[bytes, _Run] = {}

    def __bool__(self) -> bool:
        return bool(self._first)

    def hold(self, worker: Worker, names: bytes) -> int:
        """Begin a request; return the number of its blocks that no other request of that worker holds."""
        runs, at, new = self._first, 0, 0
        while at < len(names):
            run = runs.get(_name(names, at))
            if run is None:
                run = runs[_name(names, at)] = _Run(names, at, len(names))
            elif (end := _common_end(run, names)) < run.end:
                run.split(end)
            held = run.holders.get(worker, 0)
            run.holders[worker] = held + 1
            run.count += 1
            if not held:
                new += run.end - run.start
            runs, at = run.children, run.end
        return new // NAME_BYTES

    def release(self, worker: Worker, names: bytes) -> int:
        """End a request that `hold` began; return the number of its blocks that no request of its worker
        holds any more."""
        runs, at, gone = self._first, 0, 0
        last: _Run | None = None
        while at < len(names):
            run = runs[_name(names, at)]
            if run.count == 1:  # no other request holds this run, or those that follow
                del runs[_name(names, at)]
                gone += len(names) - at
                break
            run.count -= 1
            run.holders[worker] -= 1
            if not run.holders[worker]:
                del run.holders[worker]
                gone += run.end - run.start
            last, runs, at = run, run.children, run.end
        if last is not None:
            last.join_only_child()
        return gone // NAME_BYTES

    def active(self, names: bytes) -> dict[Worker, int]:
        """Return the number of blocks of a prompt that the requests of each worker hold; without workers that
        hold none."""
        found: dict[Worker, int] = {}
        runs, at = self._first, 0
        while at < len(names):
            run = runs.get(_name(names, at))
            if run is None:
                break
            at = _common_end(run, names)
            found.update(dict.fromkeys(run.holders, at // NAME_BYTES))
            if at < run.end:
                break
            runs = run.children
        return found


def _name(names: bytes, at: int) -> bytes:
    return names[at : at + NAME_BYTES]


def _common_end(run: _Run, names: bytes) -> int:
    """Return the end of the names that a run and a prompt have in common; their first names are equal."""
    return common_end(run.names, names, run.start + NAME_BYTES, min(run.end, len(names)))


def common_end(one: bytes, other: bytes, same: int, end: int) -> int:
    """Return the end of the names that two prompts have in common, `end` at most. They are known to be equal
    up to `same`. All in bytes."""
    if one[same:end] == other[same:end]:
        return end
    while end - same > NAME_BYTES:  # equal up to `same`, and not up to `end`
        middle = (same + end) // (2 * NAME_BYTES) * NAME_BYTES
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            end = middle
    return same
