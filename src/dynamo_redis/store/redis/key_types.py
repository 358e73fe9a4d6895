"""Of which type each key of this package is in Redis, and what to say of one that has another. Pure."""

from __future__ import annotations

import shlex
from typing import Final

TYPES: Final = {
    # the registry
    "meta": "hash",  # of an event stream, too
    "kv": "hash",
    "idx": "zset",
    "leases": "zset",
    "lk": "zset",
    "lr": "hash",
    "log": "stream",
    # objects and locks
    "current": "hash",
    "damaged": "set",
    "names": "zset",
    "lock": "hash",
    "fence": "string",
    "value": "hash",
    # event streams
    "events": "stream",
    "sizes": "list",
    "groups": "zset",
}
"""By the last part of a key, behind its hash tag. `docs/redis-schema.md` describes each."""

MOST_KEYS_COUNT: Final = 16
"""So many keys of a refused command are looked at."""


def describe_wrong_types(found: dict[str, str]) -> str:
    """Name the keys that are of another type than this package made them of, and the command that mends it;
    empty if none is. `found` is what the server says of each: "none" for a key that is not there."""
    wrong = {
        key: (kind, TYPES[key.rpartition(":")[2]])
        for key, kind in found.items()
        if kind not in ("none", TYPES.get(key.rpartition(":")[2], kind))
    }
    if not wrong:
        return ""
    parts = [f"{key} is a {kind} and should be a {wanted}" for key, (kind, wanted) in wrong.items()]
    command = " ".join(("redis-cli DEL", *map(shlex.quote, wrong)))
    return (
        f"{', '.join(parts)}: `{command}` mends it, and owners write theirs again;"
        " if another program wrote it, choose another DYN_REDIS_PREFIX"
    )
