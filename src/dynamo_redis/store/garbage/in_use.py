"""The objects and components that the registry's records name. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

from dynamo_redis.names import INSTANCES, KV_ROUTERS, MODEL_CARDS, decode_segment
from dynamo_redis.store.base import Snapshot

_OBJECT: Final = "redis-object://"
_OF_COMPONENTS: Final = (INSTANCES, MODEL_CARDS, KV_ROUTERS)


@dataclass(frozen=True, slots=True)
class InUse:
    """The things that must stay.

    `unreadable` names the records that cannot be read, and may name further objects."""

    urls: frozenset[str] = frozenset()
    components: frozenset[tuple[str, str]] = frozenset()
    unreadable: tuple[str, ...] = ()

    @classmethod
    def of_snapshot(cls, snapshot: Snapshot) -> Self:
        """Read all records of a registry."""
        urls: set[str] = set()
        unreadable = [str(error) for error in snapshot.invalid]
        for record in snapshot.records:
            try:
                urls.update(_urls(json.loads(record.value)))
            except (ValueError, RecursionError):
                if record.key.startswith(MODEL_CARDS) or _OBJECT.encode() in record.value:
                    unreadable.append(f"{record.key} is not JSON")
        keys = [record.key for record in snapshot.records]
        return cls(frozenset(urls), frozenset(_components(keys)), tuple(unreadable))

    def __or__(self, other: InUse) -> InUse:
        """Return what either of two readings names."""
        return InUse(
            self.urls | other.urls,
            self.components | other.components,
            (*self.unreadable, *other.unreadable),
        )


def _components(keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    for key in keys:
        for prefix in _OF_COMPONENTS:
            if key.startswith(prefix):
                namespace, _, rest = key.removeprefix(prefix).partition("/")
                yield decode_segment(namespace), decode_segment(rest.partition("/")[0])


def _urls(value: Any) -> Iterator[str]:
    """Yield the URLs of objects in a JSON value."""
    if isinstance(value, str) and value.startswith(_OBJECT):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _urls(part)
    elif isinstance(value, list):
        for part in value:
            yield from _urls(part)
