"""`RadixTree`: the KV blocks of workers as Dynamo's routers keep them, for routing programs of your own.

The router of this package has an index of its own (`router/index/prefix_index.py`), which is faster and knows
tiers. This one is for code that was written for Dynamo's. It gives the same answers, also for histories that
no engine should produce; so its shape is the same, too: a tree of *edges*, runs of blocks that are stored as
one node until they have to be split. A worker covers an edge from its beginning on, up to its `cover`.

A block has two names: `tokens_hash`, of its own tokens (`compute_block_hash_for_seq`), by which prompts are
matched, and `block_hash`, the engine's, by which later events name it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_U64 = Annotated[int, Field(ge=0, lt=1 << 64, strict=True)]
_U32 = Annotated[int, Field(ge=0, lt=1 << 32, strict=True)]


class Block(BaseModel):
    """A block, by both its names."""

    model_config = ConfigDict(frozen=True)

    block_hash: _U64
    tokens_hash: _U64


class _Stored(BaseModel):
    parent_hash: _U64 | None = None
    blocks: list[Block]


class _Removed(BaseModel):
    block_hashes: list[_U64]


class _StoredData(BaseModel):
    model_config = ConfigDict(extra="forbid")
    stored: _Stored


class _RemovedData(BaseModel):
    model_config = ConfigDict(extra="forbid")
    removed: _Removed


class _ClearedData(BaseModel):
    model_config = ConfigDict(extra="forbid")
    cleared: None


class _Event(BaseModel):
    event_id: _U64
    data: Literal["cleared"] | _StoredData | _RemovedData | _ClearedData
    dp_rank: _U32 = 0


class _Worker(NamedTuple):
    """A rank of a worker: a key of `OverlapScores.scores`."""

    worker_id: int
    dp_rank: int


class OverlapScores(NamedTuple):
    """The number of blocks at the beginning of a prompt that each worker holds, by `(worker_id, dp_rank)`.

    Workers that hold none are left out. `frequencies` is empty: uses are not counted.
    """

    scores: dict[tuple[int, int], int]
    frequencies: list[int]


class _Node:
    """An edge of the tree and its children by the `tokens_hash` of their first block.

    `cover` has the number of blocks of the edge that each worker holds, 1 or more. A node that once had
    children grows no longer (`is_inner`).
    """

    __slots__ = ("children", "cover", "edge", "is_inner", "positions")

    def __init__(self, edge: list[Block], cover: dict[_Worker, int]) -> None:
        self.edge = edge
        self.positions = {block.block_hash: position for position, block in enumerate(edge)}
        self.cover = cover
        self.children: dict[int, _Node] = {}
        self.is_inner = False

    def holders(self) -> Iterator[_Worker]:
        """Yield the workers that hold the whole edge."""
        return (worker for worker, count in self.cover.items() if count == len(self.edge))

    def extend(self, worker: _Worker, blocks: list[Block]) -> None:
        """Append blocks, which `worker` holds with the whole edge."""
        for block in blocks:
            self.positions[block.block_hash] = len(self.edge)
            self.edge.append(block)
        self.cover[worker] = len(self.edge)

    def drop(self, worker: _Worker, count: int = 0) -> None:
        """Let a worker hold only the first `count` blocks. Children of an edge that no worker holds go."""
        if count:
            self.cover[worker] = count
        else:
            self.cover.pop(worker, None)
        if next(self.holders(), None) is None:
            self.children.clear()

    def is_live(self) -> bool:
        """Return whether the node has anything to show."""
        return bool(self.cover or self.children)


class RadixTree:
    """The blocks that workers hold. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._root = _Node([], {})
        self._root.is_inner = True
        self._nodes: dict[_Worker, dict[int, _Node]] = {}
        """The node of each block that a worker has stored, by its `block_hash`."""

    def find_matches(self, sequence: Sequence[int], early_exit: bool = False) -> OverlapScores:
        """Return how many of a prompt's blocks each worker holds from the beginning on.

        `sequence` are the blocks' `tokens_hash`es. With `early_exit` the search ends where one worker is
        left. Raises TypeError or OverflowError for what is no list of u64.
        """
        wanted = _hashes(sequence)
        scores: dict[tuple[int, int], int] = {}
        if not wanted:
            return OverlapScores(scores, [])
        with self._lock:
            node, depth = self._root.children.get(wanted[0]), 0
            alive: set[_Worker] | None = None
            while node is not None:
                equal = _equal_count(node.edge, wanted[depth:])
                whole = set(node.holders())
                for worker in set(node.cover) - whole if alive is None else alive - whole:
                    if count := depth + min(node.cover.get(worker, 0), equal):
                        scores[worker] = count
                alive = whole if alive is None else alive & whole
                depth += equal
                ends_here = equal < len(node.edge) or depth == len(wanted)
                if not alive or ends_here or (early_exit and len(alive) == 1):
                    break
                node = node.children.get(wanted[depth])
        return OverlapScores(scores | dict.fromkeys(alive or (), depth), [])

    def apply_event(self, worker_id: int, kv_cache_event_bytes: bytes) -> None:
        """Apply an event of a worker: JSON with `event_id`, `data` and perhaps `dp_rank`.

        `data` is `{"stored": {"parent_hash": …, "blocks": [{"block_hash": …, "tokens_hash": …}]}}`,
        `{"removed": {"block_hashes": […]}}` or `"cleared"`. Raises ValueError for bytes that are no such
        event; RuntimeError for a parent or a block that this worker does not hold, and for blocks that follow
        themselves. Known blocks of a `removed` are removed all the same.
        """
        (worker_id,) = _hashes([worker_id])
        if not isinstance(kv_cache_event_bytes, bytes):
            raise TypeError(f"kv_cache_event_bytes must be bytes, not {type(kv_cache_event_bytes).__name__}")
        try:
            event = _Event.model_validate_json(kv_cache_event_bytes)
        except ValidationError as exc:
            found = exc.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, found["loc"]))
            raise ValueError(
                f"Failed to deserialize KvCacheEvent: {where}{': ' * bool(where)}{found['msg']}"
            ) from exc
        worker = _Worker(worker_id, event.dp_rank)
        with self._lock:
            match event.data:
                case _StoredData(stored=stored):
                    self._store(worker, stored.parent_hash, stored.blocks)
                case _RemovedData(removed=removed):
                    self._remove(worker, removed.block_hashes)
                case _:
                    self._forget(worker)

    def remove_worker(self, worker_id: int) -> None:
        """Forget all blocks of a worker, on all its ranks."""
        with self._lock:
            for worker in [worker for worker in self._nodes if worker.worker_id == worker_id]:
                self._forget(worker)

    def clear_all_blocks(self, worker_id: int) -> None:
        """Forget all blocks of a worker, which goes on."""
        self.remove_worker(worker_id)

    def dump_tree_as_events(self) -> list[str]:
        """Return the tree as events in JSON, parents first: another tree that applies them is equal."""
        events: list[str] = []
        with self._lock:
            waiting: list[tuple[_Node, int | None]] = [
                (child, None) for child in self._root.children.values() if child.is_live()
            ]
            for node, parent in waiting:
                edge = list(node.edge)
                children = [child for child in node.children.values() if child.is_live()]
                while len(children) == 1 and _is_one_edge(node, children[0]):
                    node = children[0]
                    edge += node.edge
                    children = [child for child in node.children.values() if child.is_live()]
                before = len(edge) - len(node.edge)
                for worker, count in node.cover.items():
                    events.append(_dumped(len(events), worker, parent, edge[: before + count]))
                waiting += ((child, edge[-1].block_hash) for child in children)
        return events

    # ----------------------------------------------------------------- inner steps

    def _store(self, worker: _Worker, parent_hash: int | None, blocks: list[Block]) -> None:
        """Add blocks of a worker behind its block `parent_hash`, or at the beginning. Raises RuntimeError."""
        own = self._nodes.setdefault(worker, {})
        parent = self._root
        if parent_hash is not None:
            if any(block.block_hash == parent_hash for block in blocks):
                raise RuntimeError("Failed to apply event: Invalid block sequence")
            parent, position = self._parent(worker, parent_hash)
            behind = parent.edge[position + 1 :]
            if behind[: len(blocks)] == blocks:  # a part of the edge that the worker did not hold yet
                _cover(parent, worker, position + 1 + len(blocks))
                _enter(own, blocks, parent)
                return
            if not parent.is_inner and blocks[: len(behind)] == behind:
                parent.extend(worker, blocks[len(behind) :])
                _enter(own, blocks, parent)
                return
            if parent.edge[-1].block_hash != parent_hash:
                self._split(parent, position + 1)
        self._store_behind(worker, own, parent, blocks)

    def _parent(self, worker: _Worker, parent_hash: int) -> tuple[_Node, int]:
        """Return the node of a worker's block, and the block's position in its edge. Raises RuntimeError."""
        own = self._nodes[worker]
        node = own.get(parent_hash)
        position = None if node is None else node.positions.get(parent_hash)
        if node is None or position is None:
            raise RuntimeError("Failed to apply event: Failed to find parent block")
        if node.cover.get(worker, 0) <= position:
            del own[parent_hash]
            raise RuntimeError("Failed to apply event: Failed to find parent block")
        return node, position

    def _store_behind(
        self, worker: _Worker, own: dict[int, _Node], parent: _Node, blocks: list[Block]
    ) -> None:
        """Add blocks of a worker as children of a node, along the edges that have the same tokens."""
        while blocks:
            child = parent.children.get(blocks[0].tokens_hash)
            if child is None or not child.is_live():
                if not parent.is_inner and parent.cover.get(worker) == len(parent.edge):
                    parent.extend(worker, blocks)
                    _enter(own, blocks, parent)
                else:
                    _enter(own, blocks, _add_child(parent, worker, blocks))
                return
            equal = _equal_count(child.edge, [block.tokens_hash for block in blocks])
            if equal < len(child.edge) and equal < len(blocks):
                self._split(child, equal)
            _cover(child, worker, equal)
            _enter(own, blocks[:equal], child)
            parent, blocks = child, blocks[equal:]

    def _split(self, node: _Node, position: int) -> None:
        """Make two nodes of one: its first `position` blocks, and as their only child the rest."""
        rest = _Node(
            node.edge[position:],
            {worker: count - position for worker, count in node.cover.items() if count > position},
        )
        rest.children, rest.is_inner = node.children, node.is_inner
        for block in rest.edge:
            node.positions.pop(block.block_hash, None)
        del node.edge[position:]
        node.cover = {worker: min(count, position) for worker, count in node.cover.items()}
        node.children, node.is_inner = {rest.edge[0].tokens_hash: rest}, True
        for worker, count in rest.cover.items():
            _enter(self._nodes[worker], rest.edge[:count], rest)

    def _remove(self, worker: _Worker, block_hashes: list[int]) -> None:
        """Remove a worker's blocks, and with each those behind it in its edge. Raises RuntimeError at the
        end if a block is not known."""
        own = self._nodes.setdefault(worker, {})
        gone: set[int] = set()
        all_known = True
        for block_hash in block_hashes:
            node = own.get(block_hash)
            position = None if node is None else node.positions.get(block_hash)
            if node is None or position is None:
                all_known &= block_hash in gone
                continue
            del own[block_hash]
            if position < (count := node.cover.get(worker, 0)):
                behind = [block.block_hash for block in node.edge[position:count]]
                node.drop(worker, position)
                gone.update(behind)
                for block in behind:
                    own.pop(block, None)
            else:
                gone.add(block_hash)
        if not all_known:
            raise RuntimeError("Failed to apply event: Failed to find block")

    def _forget(self, worker: _Worker) -> None:
        for node in {id(node): node for node in self._nodes.pop(worker, {}).values()}.values():
            node.drop(worker)


def _add_child(parent: _Node, worker: _Worker, blocks: list[Block]) -> _Node:
    child = _Node(list(blocks), {worker: len(blocks)})
    parent.children[blocks[0].tokens_hash] = child
    parent.is_inner = True
    return child


def _cover(node: _Node, worker: _Worker, count: int) -> None:
    """Let a worker hold the first `count` blocks of an edge at least."""
    node.cover[worker] = max(node.cover.get(worker, 0), count)


def _enter(own: dict[int, _Node], blocks: Sequence[Block], node: _Node) -> None:
    """Note the node of a worker's blocks."""
    own.update((block.block_hash, node) for block in blocks)


def _equal_count(edge: Sequence[Block], tokens_hashes: Sequence[int]) -> int:
    """Return how many blocks at the beginning of an edge have these tokens."""
    count = 0
    for block, tokens_hash in zip(edge, tokens_hashes, strict=False):
        if block.tokens_hash != tokens_hash:
            break
        count += 1
    return count


def _is_one_edge(node: _Node, child: _Node) -> bool:
    """Return whether the same workers hold all of a node and all of its child."""
    whole = set(node.holders())
    return whole == set(node.cover) and child.cover == dict.fromkeys(whole, len(child.edge)) and bool(whole)


def _dumped(event_id: int, worker: _Worker, parent: int | None, blocks: Sequence[Block]) -> str:
    stored: dict[str, Any] = {
        "parent_hash": parent,
        "start_position": None,
        "blocks": [block.model_dump() | {"mm_extra_info": None} for block in blocks],
    }
    return json.dumps(
        {
            "worker_id": worker.worker_id,
            "storage_tier": "device",
            "residency_domain": "worker",
            "event": {"event_id": event_id, "data": {"stored": stored}, "dp_rank": worker.dp_rank},
        },
        separators=(",", ":"),
    )


def _hashes(sequence: Sequence[int]) -> list[int]:
    """Return a list of u64. Raises TypeError or OverflowError."""
    hashes = list(sequence)
    for value in hashes:
        if not isinstance(value, int):
            raise TypeError(f"{value!r} is no integer")
        if not 0 <= value < 1 << 64:
            raise OverflowError(f"{value} is no u64")
    return hashes
