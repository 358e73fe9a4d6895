"""The search for an order of calls: Wing and Gong's, with Lowe's memory.

Take any call that may come next, remember each combination of calls taken and registers reached, go back when
no call fits. A call may come next if no other call that is not taken yet had ended before it began. A write
with a revision may come next only if no write with an earlier revision is left.

Two rules keep the search small. A read that fits and tells nothing new is taken at once: if it can come
later, it can come here. Of unknown calls that do the same, the one that began first stands for all.

(J. Wing and C. Gong, Testing and Verifying Concurrent Objects, 1993; G. Lowe, Testing for Linearizability,
2017.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from dynamo_redis.store.base import Revision
from dynamo_redis.store.registry.change_log import order
from faults.oracles.registers import ANYTHING, Cell, Operation, join

STEPS_COUNT: Final = 200_000
"""Steps (a few seconds) after which a search is given up, undecided."""

State = tuple[Cell, ...]


class Node(NamedTuple):
    """A point of a search. The calls before `base` are taken, and those whose bits are set in `taken`,
    counted from there. `used` counts the calls of unknown outcome that took effect, of each kind; `writes`
    counts the writes with a revision that are taken."""

    base: int
    taken: int
    used: tuple[int, ...]
    writes: int
    state: State

    def taken_count(self) -> int:
        """Return the count of answered calls that are taken."""
        return self.base + self.taken.bit_count()


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a search. `found`: there is an order; None: undecided. Otherwise the longest order that
    fits: the count of its calls, the last of them, the registers after it, and the calls of which one would
    have to come next."""

    found: bool | None
    count: int
    last: tuple[Operation, ...]
    state: State
    stuck: tuple[Operation, ...]


class Search:
    """A search over some keys. `answered` must all fit, `unknown` may."""

    def __init__(
        self, keys: Sequence[str], answered: Sequence[Operation], unknown: Sequence[Operation], initial: Cell
    ) -> None:
        self._index = {key: position for position, key in enumerate(keys)}
        self._answered = sorted(answered, key=lambda operation: operation.call.began_at)
        self._alike = _alike(unknown)
        self._conditional = [one for one in unknown if any(cell != ANYTHING for _, cell in one.demands)]
        self._start = Node(0, 0, (0,) * len(self._alike), 0, (initial,) * len(keys))
        ranked = [operation for operation in self._answered if operation.revision is not None]
        ranked.sort(key=lambda operation: order(Revision(operation.revision or "")))
        self._rank = {id(operation): rank for rank, operation in enumerate(ranked)}

    def run(self) -> Result:
        """Search until an order is found, there is none, or `STEPS_COUNT` steps are done."""
        best = self._start
        last: tuple[Operation, ...] = ()
        seen = {self._start}
        path: list[Operation] = []
        stack = [self._moves(self._start)]
        found: bool | None = not self._answered
        steps_left = STEPS_COUNT
        while stack and found is False:
            for operation, node in stack[-1]:
                steps_left -= 1
                if node in seen:
                    continue
                seen.add(node)
                path.append(operation)
                stack.append(self._moves(node))
                if node.taken_count() > best.taken_count():
                    best, last = node, tuple(path[-4:])
                break
            else:
                stack.pop()
                if path:
                    path.pop()
            if best.base == len(self._answered):
                found = True
            elif steps_left <= 0:
                found = None
        stuck = tuple(self._answered[index] for index in self._next(best)[0])
        return Result(found, best.taken_count(), last, best.state, stuck)

    def _next(self, node: Node) -> tuple[list[int], float]:
        """Return the answered calls that may come next, in the order of their ends, and the end of the
        first."""
        open_: list[int] = []
        limit = float("inf")
        for index in range(node.base, len(self._answered)):
            if node.taken >> (index - node.base) & 1:
                continue
            call = self._answered[index].call
            if call.began_at > limit:
                break
            limit = min(limit, call.ended_at)
            open_.append(index)
        fitting = [index for index in open_ if self._answered[index].call.began_at <= limit]
        return sorted(fitting, key=lambda index: self._answered[index].call.ended_at), limit

    def _moves(self, node: Node) -> Iterator[tuple[Operation, Node]]:
        candidates, limit = self._next(node)
        fitting: list[tuple[int, State]] = []
        refused: list[Operation] = []
        for index in candidates:
            operation = self._answered[index]
            state = self._after(node.state, operation)
            if state is None or self._rank.get(id(operation), node.writes) != node.writes:
                refused.append(operation)
            elif state == node.state and not operation.effects:
                yield operation, self._with_call(node, index, state)
                return
            else:
                fitting.append((index, state))
        for index, state in fitting:
            yield self._answered[index], self._with_call(node, index, state)
        others = [self._answered[index] for index, _ in fitting]
        for number, alike in enumerate(self._alike):
            used = node.used[number]
            if used == len(alike) or alike[used].call.began_at > limit:
                continue
            operation = alike[used]
            after = self._after(node.state, operation)
            if after is not None and after != node.state and self._may_help(operation, refused, others):
                counts = (*node.used[:number], used + 1, *node.used[number + 1 :])
                yield operation, node._replace(used=counts, state=after)

    def _with_call(self, node: Node, index: int, state: State) -> Node:
        taken = node.taken | 1 << (index - node.base)
        base = node.base
        while taken & 1:
            taken >>= 1
            base += 1
        writes = node.writes + (id(self._answered[index]) in self._rank)
        return Node(base, taken, node.used, writes, state)

    def _may_help(
        self, unknown: Operation, refused: Sequence[Operation], fitting: Sequence[Operation]
    ) -> bool:
        """Return whether to let a call of unknown outcome take effect here, or leave it for later (or for
        never).

        It is True if the call makes one of its keys the cell that a call demands which does not fit without
        it; that may be another unknown call, which in turn lets one fit. A call that fits may as well go
        first, unless it writes the cell that the unknown one demands, or overwrites a part of the unknown
        one's writes.
        """
        for key, cell in unknown.effects:
            for other in (*refused, *self._conditional):
                if any(key == wanted and join(cell, demanded) for wanted, demanded in other.demands):
                    return True
        keys = unknown.keys
        return len(keys) > 1 and any(key in keys for other in fitting for key, _ in other.effects)

    def _after(self, state: State, operation: Operation) -> State | None:
        """Return the registers after an operation; None if they do not meet its demands."""
        cells = list(state)
        for key, demanded in operation.demands:
            cell = join(cells[self._index[key]], demanded)
            if cell is None:
                return None
            cells[self._index[key]] = cell
        for key, cell in operation.effects:
            cells[self._index[key]] = cell
        return tuple(cells)


def _alike(unknown: Sequence[Operation]) -> list[list[Operation]]:
    """Return the calls that demand and do the same, each list in order of time."""
    kinds: defaultdict[object, list[Operation]] = defaultdict(list)
    for operation in sorted(unknown, key=lambda operation: operation.call.began_at):
        kinds[operation.demands, operation.effects].append(operation)
    return list(kinds.values())
