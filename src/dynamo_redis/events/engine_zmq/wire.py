"""The wire format of engines' KV events over ZeroMQ: that of vLLM, which SGLang has, too. Pure.

A message is `[topic, sequence, payload]`: the sequence eight bytes, big-endian, from 0 for each start of the
engine; the payload msgpack, `[ts, events, data_parallel_rank]` or a map of these. An event is a map with a
`type`, or an array that begins with it and has its fields in the order below (vLLM up to 0.10). Fields and
types of later releases are ignored. Sources: vLLM's `distributed/kv_events.py`, SGLang's
`disaggregation/kv_events.py`.

Some blocks cannot be found by a prompt's token ids alone. These events and blocks are left out, and counted
by reason in `left_out`:

- `unknown_type`, `unknown_medium`: events of a kind that this release does not know;
- `unnamed_adapter`: blocks of a LoRA adapter of which the event has a number and no name;
- `extra_keys`: blocks whose hash depends on more than tokens and adapter (images, a cache salt).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from typing import Any, Final

from dynamo_redis.wire.codec import unpack
from dynamo_redis.wire.kv_event import DEVICE, DISK, HOST

EngineHash = int | bytes
"""An engine's own hash of a block. Integers are unsigned 64 bits here; engines may send them signed."""

END_OF_REPLAY: Final = -1
"""The sequence of the last message of a replay."""

_STORED_FIELDS: Final = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
)
_REMOVED_FIELDS: Final = ("block_hashes", "medium", "group_idx")
_FIELDS: Final = {"BlockStored": _STORED_FIELDS, "BlockRemoved": _REMOVED_FIELDS, "AllBlocksCleared": ()}
_BATCH_FIELDS: Final = ("ts", "events", "data_parallel_rank")

_TIERS: Final = {
    None: DEVICE,
    "GPU": DEVICE,
    "CPU": HOST,
    "CPU_PINNED": HOST,
    "STORAGE": DISK,
    "DISK": DISK,
}

_FULL_ATTENTION_KINDS: Final = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of KV-cache groups whose blocks are valid for every longer prompt."""

_U64_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class EventSource:
    """The addresses of one rank's sockets, to connect to. `topic` "" receives all messages."""

    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """Consecutive blocks were stored; the parent is the block before them, or None.

    Without `token_ids` they are known blocks that are now on another tier. `group` is the KV-cache group, for
    a model with several; `full_attention` is True if that group keeps all blocks of a prompt.
    """

    block_hashes: list[EngineHash]
    parent_hash: EngineHash | None
    token_ids: list[Any]
    block_size: int
    tier: int
    lora_name: str | None
    group: int | None
    full_attention: bool
    nameless_hashes: list[EngineHash] = field(default_factory=list)
    """The blocks after these, whose hashes depend on more than tokens and adapter."""


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks were removed from that tier and group."""

    block_hashes: list[EngineHash]
    tier: int
    group: int | None


@dataclass(frozen=True, slots=True)
class Cleared:
    """The cache was emptied."""


EngineEvent = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class EngineBatch:
    """The events of one message, and the numbers of those left out by reason."""

    events: list[EngineEvent]
    dp_rank: int | None
    left_out: Counter[str] = field(default_factory=Counter)


# --------------------------------------------------------------------------- messages


def split_message(frames: Sequence[bytes]) -> tuple[int, bytes]:
    """Return the sequence and the payload of a published or replayed message. Raises ValueError.

    The frames before them, the topic or an empty delimiter, are ignored. The sequence is END_OF_REPLAY at the
    end of a replay.
    """
    if len(frames) < 2 or len(frames[-2]) != 8:
        raise ValueError(f"not a KV event message: frames of {[len(frame) for frame in frames]} bytes")
    return int.from_bytes(frames[-2], "big", signed=True), frames[-1]


def replay_request(first_sequence: int) -> list[bytes]:
    """Return the request for all messages that a replay socket still has from that sequence on."""
    return [b"", first_sequence.to_bytes(8, "big")]


def decode_batch(payload: bytes) -> EngineBatch:
    """Decode the payload of a message. Raises ValueError if any part of it is invalid."""
    batch = _named(unpack(payload), _BATCH_FIELDS, "batch")
    events, dp_rank = batch.get("events"), batch.get("data_parallel_rank")
    if not isinstance(events, list):
        raise ValueError("not a KV event batch: no list of events")
    decoded = EngineBatch([], _optional_int(dp_rank, "data_parallel_rank"))
    for event in events:
        known = _event(event, decoded.left_out)
        if known is not None:
            decoded.events.append(known)
    return decoded


# --------------------------------------------------------------------------- events


def _event(event: object, left_out: Counter[str]) -> EngineEvent | None:
    """Return the event, or None if it is left out, and count that. Raises ValueError."""
    content: object = event
    if isinstance(event, list) and event:
        kind, content = event[0], event[1:]
    elif isinstance(event, dict):
        kind = event.get("type")
    else:
        raise ValueError("not a KV event: neither an array nor a map")
    if not isinstance(kind, str):
        raise ValueError("not a KV event: it has no type")
    names = _FIELDS.get(kind)
    if names is None:
        left_out["unknown_type"] += 1
        return None
    if kind == "AllBlocksCleared":
        return Cleared()
    fields = _named(content, names, kind)
    medium = fields.get("medium")
    if medium is not None and not isinstance(medium, str):
        raise ValueError(f"not a {kind}: medium is {type(medium).__name__}")
    tier = _TIERS.get(medium)
    if tier is None:
        left_out["unknown_medium"] += 1
        return None
    if kind == "BlockStored":
        return _stored(fields, tier, left_out)
    group = _optional_int(fields.get("group_idx"), "group_idx")
    return Removed(_hashes(fields.get("block_hashes")), tier, group)


def _stored(fields: Mapping[Any, Any], tier: int, left_out: Counter[str]) -> Stored | None:
    """Return the event of these fields, or None if all of it is left out. Raises ValueError."""
    block_hashes = _hashes(fields.get("block_hashes"))
    parent, token_ids = fields.get("parent_block_hash"), fields.get("token_ids")
    block_size, lora_name = fields.get("block_size"), fields.get("lora_name")
    if not isinstance(token_ids, list):
        raise ValueError(f"not a BlockStored: token_ids is {type(token_ids).__name__}")
    if type(block_size) is not int or block_size < 0:
        raise ValueError(f"not a BlockStored: block_size is {block_size!r}")
    if lora_name is not None and not isinstance(lora_name, str):
        raise ValueError(f"not a BlockStored: lora_name is {type(lora_name).__name__}")
    if lora_name is None and fields.get("lora_id") is not None:
        left_out["unnamed_adapter"] += len(block_hashes)
        return None
    extra_keys = fields.get("extra_keys")
    if extra_keys is not None and not isinstance(extra_keys, list):
        raise ValueError(f"not a BlockStored: extra_keys is {type(extra_keys).__name__}")
    # The number of blocks, from the first on, whose hashes depend on tokens and adapter alone.
    plain_count = len(block_hashes)
    for index, keys in enumerate((extra_keys or [])[:plain_count]):
        if keys is not None and not (isinstance(keys, list) and all(key == lora_name for key in keys)):
            plain_count = index
            break
    nameless_hashes = block_hashes[plain_count:]
    if nameless_hashes:
        left_out["extra_keys"] += len(nameless_hashes)
        block_hashes, token_ids = block_hashes[:plain_count], token_ids[: plain_count * block_size]
    window, kind = fields.get("kv_cache_spec_sliding_window"), fields.get("kv_cache_spec_kind")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"not a BlockStored: kv_cache_spec_kind is {type(kind).__name__}")
    return Stored(
        block_hashes=block_hashes,
        parent_hash=None if parent is None else _hash(parent),
        token_ids=token_ids,
        block_size=block_size,
        tier=tier,
        lora_name=lora_name or None,
        group=_optional_int(fields.get("group_idx"), "group_idx"),
        full_attention=window is None and kind in _FULL_ATTENTION_KINDS,
        nameless_hashes=nameless_hashes,
    )


# --------------------------------------------------------------------------- fields


def _named(content: object, names: Sequence[str], what: str) -> Mapping[Any, Any]:
    """Return the fields by name, from a map or from an array in the order of `names`. Raises ValueError."""
    if isinstance(content, dict):
        return content
    if not isinstance(content, list):
        raise ValueError(f"not a {what}: {type(content).__name__}")
    return dict(zip_longest(names, content[: len(names)]))


def _hashes(value: object) -> list[EngineHash]:
    if not isinstance(value, list):
        raise ValueError(f"not a KV event: block_hashes is {type(value).__name__}")
    return [_hash(item) for item in value]


def _hash(value: object) -> EngineHash:
    if isinstance(value, bytes):
        return value
    if type(value) is not int:
        raise ValueError(f"not a block hash: {type(value).__name__}")
    return value & _U64_MASK


def _optional_int(value: object, name: str) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"not a KV event: {name} is {value!r}")
    return value


# --------------------------------------------------------------------------- groups


def join_removals(events: Iterable[EngineEvent]) -> Iterator[EngineEvent]:
    """Yield the events; consecutive removals from one tier and group are joined to one event.

    Engines send an event for each block that they evict.
    """

    def removal_place(event: EngineEvent) -> tuple[int, int | None] | None:
        return (event.tier, event.group) if isinstance(event, Removed) else None

    for place, run in groupby(events, removal_place):
        if place is None:
            yield from run
        else:
            hashes = [each for event in run if isinstance(event, Removed) for each in event.block_hashes]
            yield Removed(hashes, *place)


class MainGroup:
    """The filter for events of the one KV-cache group, of a rank, that decides the prefix hits of a prompt.

    A model with different layers (sliding windows, Mamba) has several groups. A block has the same hash in
    all of them, and each group evicts it by itself. The main group is the first full-attention group that
    stores a block: only such a group keeps a prompt from its beginning. An event without a group belongs to
    it.
    """

    def __init__(self) -> None:
        self._group: int | None = None

    def includes(self, event: EngineEvent) -> bool:
        """Return whether the event is of the main group."""
        if isinstance(event, Cleared) or event.group is None:
            return True
        if self._group is None and isinstance(event, Stored) and event.full_attention:
            self._group = event.group
        return event.group == self._group

    def forget(self) -> None:
        """Forget the group: the engine has restarted."""
        self._group = None
