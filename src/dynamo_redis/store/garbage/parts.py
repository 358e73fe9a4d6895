"""The part of the store to which a key belongs, read from its name alone. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from dynamo_redis.store.event_base import StreamName
from dynamo_redis.store.keys import STRUCTURES, stream_of_tag
from dynamo_redis.store.objects.chunks import CLAIM_S, DAMAGE_IS_KNOWN_S, EXPIRY_S

CHECK_KEY_TTL_S: Final = 30.0
"""TTL of the stream that `dynamo-redis doctor` makes."""

INBOX_TTL_S: Final = 30.0
"""TTL of a process's stream on the redis plane, unless renewed."""

_STREAM_PARTS: Final = frozenset({"events", "meta", "groups", "sizes"})
_LOCK_PARTS: Final = frozenset({"lock", "fence", "value"})
_OBJECT_TTL_S: Final = {"claim": CLAIM_S, "done": EXPIRY_S, "damaged": float(DAMAGE_IS_KNOWN_S)}
_NAMED: Final = re.compile(r"(claim|done|chunk):(.+)", re.DOTALL)


class Place(StrEnum):
    """The part of the store that a key belongs to."""

    REGISTRY = "registry"
    NAMES = "names"
    POINTER = "pointer"
    CHUNK = "chunk"
    TEMPORARY = "temporary"
    LOCK = "lock"
    FENCE = "fence"
    STREAM = "stream"


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the deployment.

    `tag` is its hash tag with the braces. `path` names the object (`<bucket>/<name>`, percent-encoded);
    `name` is that of a chunk. `stream` is the stream that it is a part of. `ttl_s`: the TTL that the writers
    of such a temporary key give it.
    """

    key: str
    place: Place
    tag: str = ""
    path: str = ""
    name: str = ""
    stream: StreamName | None = None
    ttl_s: float = 0.0


def place_key(prefix: str, key: str) -> Key | None:
    """Return what a key is; None for a key that no release up to this one writes."""
    own = f"{{{prefix}}}:"
    if key.startswith(own):
        return _of_registry(key, key.removeprefix(own))
    head = f"{{{prefix}/"
    tag, separator, part = key.removeprefix(head).partition("}:")
    if not key.startswith(head) or not separator:
        return None
    whole_tag = f"{head}{tag}}}"
    match tag.split("/"):
        case ["object"] if part == "names":
            return Key(key, Place.NAMES)
        case ["object", bucket, name] if bucket and name:
            return _of_object(key, whole_tag, f"{bucket}/{name}", part)
        case ["lock", name] if name and part in _LOCK_PARTS:
            return Key(key, Place.FENCE if part == "fence" else Place.LOCK, whole_tag)
        case ["plane", "requests" | "replies", _, _] if part == "inbox":
            return Key(key, Place.TEMPORARY, whole_tag, ttl_s=INBOX_TTL_S)
        case _ if part in _STREAM_PARTS and (stream := stream_of_tag(tag)) is not None:
            return Key(key, Place.STREAM, whole_tag, stream=stream)
    return None


def _of_registry(key: str, part: str) -> Key | None:
    if part in STRUCTURES or part.startswith("lease:"):
        return Key(key, Place.REGISTRY)
    if part.startswith("doctor:"):
        return Key(key, Place.TEMPORARY, ttl_s=CHECK_KEY_TTL_S)
    return None


def _of_object(key: str, tag: str, path: str, part: str) -> Key | None:
    if part == "current":
        return Key(key, Place.POINTER, tag, path)
    if part in _LOCK_PARTS:
        return Key(key, Place.FENCE if part == "fence" else Place.LOCK, tag, path)
    if part == "damaged":
        return Key(key, Place.TEMPORARY, tag, path, ttl_s=_OBJECT_TTL_S[part])
    named = _NAMED.fullmatch(part)
    if named is None:
        return None
    if named[1] == "chunk":
        return Key(key, Place.CHUNK, tag, path, named[2])
    return Key(key, Place.TEMPORARY, tag, path, ttl_s=_OBJECT_TTL_S[named[1]])
