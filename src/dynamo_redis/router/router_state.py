"""The state of a router, in numbers that are sent as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from dynamo_redis.errors import InvalidRecord
from dynamo_redis.router.base import Worker, WorkerLoad

_WHAT: Final = "a router's state"
_NUMBER: Final = (int, float)
_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "router_id": (str,),
    "endpoint": (str,),
    "mode": (str,),
    "workers": (list,),
    "active_count": (int,),
    "waiting_count": (int,),
    "hit_rate": (*_NUMBER, type(None)),
    "index": (dict,),
}
_INDEX_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "block_count": (int,),
    "mode": (str,),
    "caught_up": (bool,),
    "connected": (bool,),
    "disconnected_s": _NUMBER,
}


@dataclass(slots=True)
class Counts:
    """The counts of a router since its start. Tokens are those of prompts that were answered."""

    request_count: int = 0
    """Requests for which it chose a worker; retries count."""
    blind_count: int = 0
    """Those of them for which the blocks of a listed worker were not known."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the workers had in their caches, by their own reports."""
    expected_tokens: int = 0
    """Prompt tokens that the router expected there."""

    @property
    def hit_rate(self) -> float | None:
        """Part of the prompt tokens that the workers had in their caches; None before the first answer."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None


@dataclass(frozen=True, slots=True)
class RouterState:
    """The present state of a router. `index` is the state of its `Indexer`, or of its predictions."""

    router_id: str
    endpoint: str
    instance_id: int
    block_size: int
    mode: str
    """`events`, `predicted`, or `load` for a router that knows no blocks."""
    synced: bool
    """True if it exchanges bookings with other routers."""
    workers: list[dict[str, Any]]
    active_count: int
    """Requests of this router that are under way."""
    waiting_count: int
    counts: Counts
    index: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the state as it is sent and printed."""
        return {**asdict(self), "hit_rate": self.counts.hit_rate}


def describe_workers(
    workers: list[Worker], blocks: Mapping[Worker, int], loads: Mapping[Worker, WorkerLoad]
) -> list[dict[str, Any]]:
    """Return an entry for each rank: the blocks that it holds, and its load."""
    idle = WorkerLoad(0, 0, 0)
    return [
        {
            "instance_id": worker.instance_id,
            "dp_rank": worker.dp_rank,
            "cached_blocks": blocks.get(worker, 0),
            **loads.get(worker, idle)._asdict(),
        }
        for worker in workers
    ]


def check_state(answer: Any) -> dict[str, Any]:
    """Return a router's answer if it is of the form that `RouterState.to_json` makes; fields of later
    releases stay. Raises InvalidRecord."""
    state = _check_fields(answer, _FIELDS)
    index = state["index"]
    _check_fields(index, _INDEX_FIELDS if state["mode"] == "events" else {"block_count": (int,)})
    snapshot = index.get("snapshot")
    if snapshot is not None:
        _check_fields(snapshot, {"at": _NUMBER})
    if index.get("lag_count") is not None:
        _check_fields(index, {"lag_count": (int,), "lag_s": (*_NUMBER, type(None))})
    return state


def _check_fields(found: Any, fields: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Return `found` if it is a map with these fields, of these types. Raises InvalidRecord."""
    if type(found) is not dict:
        raise InvalidRecord(_WHAT, f"a {type(found).__name__} where a map should be")
    for name, types in fields.items():
        value = found.get(name)
        if type(value) not in types or (type(value) is float and not math.isfinite(value)):
            raise InvalidRecord(_WHAT, f"its {name} is {value!r}")
    return found
