"""The Redis type of each key of this package, and the message for a key of another type. Pure."""

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
    # the request plane through Redis
    "inbox": "stream",
}
"""By the last part of a key, behind its hash tag. `docs/redis-schema.md` describes each."""

MOST_KEYS_COUNT: Final = 16
"""Most keys of a refused command whose type is asked for."""


def describe_wrong_types(found: dict[str, str]) -> str:
    """Return a sentence that names the keys of a wrong type, and the command that repairs them.

    Empty if no type is wrong. `found` has the type of each key; "none" for a key that does not exist."""
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
