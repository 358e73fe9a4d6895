"""The key by which a command finds its node. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dynamo_redis.store.keys import slot_of_tag
from dynamo_redis.store.redis.blocking import Argument

_KEY_PLACES: Final = {"XINFO": 2, "XGROUP": 2, "OBJECT": 2, "MEMORY": 2, "EVAL": 3, "EVALSHA": 3}
"""Places of the first key in commands where that is not the second word."""
_KEYLESS: Final = frozenset(
    {"ACL", "CLIENT", "CLUSTER", "COMMAND", "CONFIG", "DBSIZE", "INFO", "LATENCY", "PING", "ROLE", "SCRIPT"}
    | {"SCAN", "SLOWLOG", "TIME", "WAIT"}
)


def slot_of_key(key: Argument) -> int:
    """Return the slot of a key: that of its hash tag, if it has one."""
    text = key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else str(key)
    _, brace, rest = text.partition("{")
    tag, end, _ = rest.partition("}")
    return slot_of_tag(tag if brace and end and tag else text)


def key_of(command: Sequence[Argument]) -> Argument | None:
    """Return the first key of a command; None for a command without one, which any node may run."""
    name = str(command[0]).upper()
    if name in ("XREAD", "XREADGROUP"):
        words = [str(word).upper() for word in command]
        options_at = 4 if name == "XREADGROUP" else 1  # a group or consumer may have any name
        return command[words.index("STREAMS", options_at) + 1]
    if name in _KEYLESS or len(command) < 2:
        return None
    return command[_KEY_PLACES.get(name, 1)]
