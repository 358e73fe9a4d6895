"""The rights in Redis that each kind of process needs: commands, keys and channels, as rules for ACL users.

A role is made of parts. A part is one thing that a process does in Redis, with the commands that it sends for
that, those of its scripts included (a script runs with the rights of its user), and the keys it sends them
to. `dynamo-redis acl` prints the rules, `dynamo-redis doctor` checks them. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, get_args

from dynamo_redis.store.keys import RegistryKeys, inbox_pattern
from dynamo_redis.wire.topics import ACTIVE_SEQUENCES, FORWARD_PASS_METRICS, KV_EVENTS, KV_METRICS

Role = Literal["frontend", "worker", "router", "admin", "viewer"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)

Form = Literal["7.0", "6.2"]
"""The language of rules: Redis 7.0 and Valkey can restrict keys to reads (`%R~`) and have selectors."""

_GLOB: Final = re.compile(r"([*?\[\]\\^])")


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that a process does in Redis.

    `commands` are in lower case, with a subcommand after `|`. `keys` and `channels` are patterns, in which
    `@` stands for the prefix; the channel `LEASES` is that of the keys of all leases. `access`: the role may
    only read (`R`) or only write (`W`) these keys. `is_extra`: these commands may be sent to the keys of this
    part alone. Servers without selectors grant them like all others.
    """

    commands: tuple[str, ...]
    keys: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    access: Literal["", "R", "W"] = ""
    is_extra: bool = False


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_CONNECT: Final = Part(_words("ping info role client|setname cluster|slots asking"))
"""The commands of each new connection; ROLE behind Sentinels, CLUSTER SLOTS and ASKING on a
cluster."""

_SCRIPTS: Final = _words("eval evalsha time")

_REGISTRY: Final = Part(
    (
        *_SCRIPTS,
        *_words(
            "exists hget hmget hset hdel hstrlen zadd zrem zscore zcard zcount zrangebylex zrangebyscore"
            " set del unlink pexpire xadd xdel xlen xrange xrevrange xread psubscribe type"
        ),
    ),
    ("{@}:*",),
    ("LEASES",),
)
"""Records under a lease, a watch of all, and the reaping of leases that have ended. TYPE names the key in an
error message."""

_PUT_OBJECT: Final = _words(
    "exists get set strlen hget hmget hgetall hset sismember smembers srem persist pexpire pttl zadd"
)
_GET_OBJECT: Final = _words("get hmget hgetall sadd expire pexpire pttl")
_LOCK: Final = _words("get set hget hmget hset del pexpire pttl")
_OBJECT_NAMES: Final = "{@/object}:names"

_UPLOAD_MODELS: Final = Part((*_SCRIPTS, *_PUT_OBJECT), ("{@/object/models/*", _OBJECT_NAMES))
_READ_MODELS: Final = Part(_words("get hmget hgetall"), ("{@/object/models/*",), access="R")
_KEEP_MODELS: Final = Part(
    _words("eval evalsha sadd expire pttl pexpire"), ("{@/object/models/*",), is_extra=True
)
"""A reader lets the files of a replaced model live on while it reads, and reports damaged ones."""
_SNAPSHOTS: Final = Part(
    (*_SCRIPTS, *_PUT_OBJECT, *_GET_OBJECT, *_LOCK), ("{@/object/kv_snapshots/*", _OBJECT_NAMES)
)

_STREAM: Final = _words(
    "exists hmget hset hdel llen lpush lrange ltrim unlink xgroup|create xgroup|destroy xinfo|groups"
    " xinfo|stream xlen xpending xrange xtrim zadd zrange zrem zscore"
)
"""The commands of the scripts of streams, each of which removes silent groups and mends the head."""
_PUBLISH: Final = (*_SCRIPTS, *_STREAM, *_words("multi exec xadd rpush hincrby xrevrange pexpire"))
_READ: Final = (*_SCRIPTS, *_STREAM, *_words("xread xreadgroup xack xrevrange"))

_KV_EVENTS: Final = (f"{{@/*/{KV_EVENTS}/*",)
_BOOKINGS: Final = (f"{{@/*/{ACTIVE_SEQUENCES}/*",)

_PUBLISH_EVENTS: Final = Part(
    (*_PUBLISH, "publish"),
    _KV_EVENTS,
    tuple(f"{{@/*/{topic}/*" for topic in (KV_EVENTS, KV_METRICS, FORWARD_PASS_METRICS)),
)
_ROUTE: Final = Part(
    (*_READ, "subscribe"), _KV_EVENTS, tuple(f"{{@/*/{topic}/*" for topic in (KV_EVENTS, KV_METRICS))
)
_EXCHANGE_BOOKINGS: Final = Part((*_PUBLISH, *_READ), _BOOKINGS)
_ADMINISTER: Final = Part(
    (
        *_SCRIPTS,
        *_PUT_OBJECT,
        *_GET_OBJECT,
        *_LOCK,
        *_words("zscore zrem zscan scan unlink zrange xlen xinfo|groups xinfo|stream xpending xread"),
    ),
    ("{@/*",),
)
"""The commands for objects, locks and event streams."""

_LOOK: Final = Part(
    _words(
        "time type hmget hgetall get exists zrangebylex zscore zrange zscan scan xrange xrevrange xread xlen"
        " xinfo|groups xinfo|stream xpending"
    ),
    ("{@}:*", "{@/*"),
    access="R",
)

_PARTS: Final[dict[Role, tuple[Part, ...]]] = {
    "frontend": (
        _CONNECT,
        _REGISTRY,
        _READ_MODELS,
        _KEEP_MODELS,
        _SNAPSHOTS,
        _ROUTE,
        _EXCHANGE_BOOKINGS,
    ),
    "worker": (_CONNECT, _REGISTRY, _UPLOAD_MODELS, _PUBLISH_EVENTS),
    "router": (_CONNECT, _REGISTRY, _SNAPSHOTS, _ROUTE, _EXCHANGE_BOOKINGS),
    "admin": (_CONNECT, _REGISTRY, _ADMINISTER),
    "viewer": (_CONNECT, _LOOK),
}

_READ_INBOX: Final = _words("xadd xread xtrim pexpire unlink multi exec")


def parts_of(role: Role, *, plane_user: str | None = None) -> tuple[Part, ...]:
    """Return what processes of a role do. `plane_user`: the user's name in the keys of the redis plane, if
    requests pass through Redis."""
    if plane_user is None or role == "viewer":
        return _PARTS[role]
    serves = role in ("worker", "router", "frontend")  # routers and frontends answer the commands that ask
    found = [*_PARTS[role], _inbox("replies", plane_user), _outbox("requests")]
    if serves:
        found += [_inbox("requests", plane_user), _outbox("replies")]
    return tuple(found)


def _inbox(kind: Literal["requests", "replies"], user: str) -> Part:
    return Part(_READ_INBOX, (inbox_pattern("@", kind, user),), is_extra=True)


def _outbox(kind: Literal["requests", "replies"]) -> Part:
    return Part(("xadd",), (_braced(inbox_pattern("", kind)),), access="W", is_extra=True)


def _braced(pattern: str) -> str:
    """Return a pattern made with an empty prefix, `{/plane/…`, with the place of the prefix marked."""
    return pattern.replace("{/", "{@/", 1)


def commands_of(role: Role, *, plane_user: str | None = None) -> frozenset[str]:
    """Return all commands that a role may send."""
    return frozenset(command for part in parts_of(role, plane_user=plane_user) for command in part.commands)


def rules(role: Role, prefix: str, *, form: Form = "7.0", plane_user: str | None = None) -> list[str]:
    """Return a role's rules, each a word of `ACL SETUSER`, or a selector of several words.

    They are to follow `reset on >PASSWORD`.
    """
    parts = parts_of(role, plane_user=plane_user)
    root = [part for part in parts if form == "6.2" or not part.is_extra]
    keys: dict[str, str] = {}
    for part in root:
        for pattern in part.keys:
            keys.setdefault(key_pattern(pattern, prefix), part.access if form == "7.0" else "")
    words = ["resetchannels"]
    words += [f"%{access}~{key}" if access else f"~{key}" for key, access in keys.items()]
    channels = [channel_pattern(each, prefix) for part in root for each in part.channels]
    words += [f"&{channel}" for channel in dict.fromkeys(channels)]
    words.append("-@all")
    words += [f"+{command}" for command in sorted({each for part in root for each in part.commands})]
    selectors = [part for part in parts if part not in root]
    words += [_selector(part, prefix) for part in selectors]
    return words


def _selector(part: Part, prefix: str) -> str:
    access = f"%{part.access}~" if part.access else "~"
    keys = (access + key_pattern(pattern, prefix) for pattern in part.keys)
    return f"({' '.join((*(f'+{command}' for command in part.commands), *keys))})"


def key_pattern(pattern: str, prefix: str) -> str:
    """Return a part's pattern of keys for a prefix."""
    return pattern.replace("@", _GLOB.sub(r"\\\1", prefix))


def channel_pattern(pattern: str, prefix: str) -> str:
    """Return a part's pattern of channels for a prefix.

    Redis compares the pattern of a PSUBSCRIBE with the rules as text: that of leases is exactly the one that
    processes send.
    """
    return RegistryKeys(prefix).lease_channel if pattern == "LEASES" else key_pattern(pattern, prefix)


def examples(part: Part, prefix: str, name: str) -> Iterator[tuple[str, str]]:
    """Return each command of a part with keys that it may be sent to, whose free part is `name`; "" where the
    command has no key. A pattern that is one key, and not a name's beginning, is left out."""
    keys = [pattern.replace("*", name).replace("@", prefix) for pattern in part.keys if "*" in pattern]
    for command in part.commands:
        for key in keys or [""]:
            yield command, key
