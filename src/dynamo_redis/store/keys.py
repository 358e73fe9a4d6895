"""Keys in Redis of the registry, objects, locks and event streams. `docs/redis-schema.md` describes each.

Keys that one script may touch share a hash tag, so that on a cluster they live on one node: `{prefix}` for
the registry, and a tag for each object, lock and stream.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_redis.errors import ConfigError
from dynamo_redis.names import decode_segment, encode_segment, format_instance_id
from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.event_base import StreamName

SCHEMA_VERSION = "1"
"""`major[.minor]`. Another major is refused; a minor only adds what this release may ignore."""

STRUCTURES = ("meta", "kv", "idx", "leases", "lk", "lr", "log")
"""The registry's structures, in the order in which scripts get them as KEYS."""

KEY_MAX_BYTES = 1024
"""Longest key of the registry, encoded."""

VALUE_MAX_BYTES = 1 << 20
"""Largest value of the registry: each stays in the change log for thousands of changes. Else: an object."""

TRANSACTION_MAX_COUNT = 1000
"""Most comparisons and operations of one transaction, together: Redis serves nothing else while it runs."""

TRANSACTION_MAX_BYTES = 2 << 20
"""Most bytes of the values that a transaction writes, and of the records that it finds under its keys."""

ALWAYS_FIT_COUNT = 2
"""So many operations are never refused for what they find: each value is `VALUE_MAX_BYTES` at most."""

_EVENTS = ":events"
_GLOB = re.compile(r"([*?\[\]\\^])")


@dataclass(frozen=True, slots=True)
class RegistryKeys:
    """The names of one registry's keys."""

    prefix: str

    def structure(self, name: str) -> str:
        """One of `STRUCTURES`, for example `{dynamo}:meta`."""
        return f"{{{self.prefix}}}:{name}"

    @property
    def structures(self) -> tuple[str, ...]:
        """All of them, as every registry script wants its first keys."""
        return tuple(map(self.structure, STRUCTURES))

    @property
    def log(self) -> str:
        """The change log, which readers block on."""
        return self.structure("log")

    @property
    def meta(self) -> str:
        """The registry's head."""
        return self.structure("meta")

    def lease(self, lease: LeaseId) -> str:
        """The key whose expiry announces a lease's end."""
        return self.structure(f"lease:{format_lease(lease)}")

    @property
    def lease_channel(self) -> str:
        """Pattern of the keyspace notifications of all leases' keys (database 0)."""
        literal = "".join(f"\\{char}" if char in "*?[]\\" else char for char in self.structure("lease:"))
        return f"__keyspace@0__:{literal}*"


@dataclass(frozen=True, slots=True)
class ObjectKeys:
    """Where an object is kept: all its keys have one hash tag. Raises ValueError for an empty name."""

    prefix: str
    bucket: str
    name: str

    def __post_init__(self) -> None:
        if not self.bucket or not self.name:
            raise ValueError(f"an object has a bucket and a name, not {self.bucket!r} and {self.name!r}")

    @property
    def path(self) -> str:
        """`<bucket>/<name>`, both percent-encoded: the object's name in the index."""
        return f"{encode_segment(self.bucket)}/{encode_segment(self.name)}"

    @property
    def url(self) -> str:
        return f"redis-object://{self.bucket}/{self.name}"

    @property
    def current(self) -> str:
        """The pointer to the current version: a hash that holds its manifest."""
        return f"{{{self.prefix}/object/{self.path}}}:current"

    @property
    def damaged(self) -> str:
        """The names of chunks that a reader found damaged: the next put sends them again."""
        return f"{{{self.prefix}/object/{self.path}}}:damaged"

    def chunk(self, name: str) -> str:
        """A chunk, by the name that `chunk_name` gives it."""
        return f"{{{self.prefix}/object/{self.path}}}:chunk:{name}"

    def chunks(self, names: Sequence[str]) -> list[str]:
        """The keys of several chunks."""
        return [self.chunk(name) for name in names]

    def done(self, version: str) -> str:
        """The mark that a commit leaves: it took effect, whatever has become of the object since."""
        return f"{{{self.prefix}/object/{self.path}}}:done:{version}"

    def claim(self, name: str) -> str:
        """Who is sending that chunk just now."""
        return f"{{{self.prefix}/object/{self.path}}}:claim:{name}"

    @classmethod
    def of_path(cls, prefix: str, path: str) -> ObjectKeys:
        """The reverse of `path`. Raises ValueError."""
        bucket, _, name = path.partition("/")
        return cls(prefix, decode_segment(bucket), decode_segment(name))


@dataclass(frozen=True, slots=True)
class LockKeys:
    """A lock's name, and the hash tag that all its keys have in common.

    `object_pointer` is the manifest that the lock of an object protects beside its own value.
    """

    name: str
    tag: str
    object_pointer: str | None = None

    @classmethod
    def of_name(cls, prefix: str, name: str) -> LockKeys:
        """A lock of its own. Raises ConfigError for an empty name."""
        if not name:
            raise ConfigError("a lock has a name, not ''")
        return cls(name, f"{{{prefix}/lock/{encode_segment(name)}}}")

    @classmethod
    def of_object(cls, prefix: str, bucket: str, name: str) -> LockKeys:
        """The lock of an object, in that object's tag. Raises ValueError for an empty name."""
        keys = ObjectKeys(prefix, bucket, name)
        return cls(keys.url, f"{{{prefix}/object/{keys.path}}}", keys.current)

    @property
    def lock(self) -> str:
        """A hash that says who has it; it is there, and has the lock's TTL, while somebody does."""
        return f"{self.tag}:lock"

    @property
    def fence(self) -> str:
        """The last fencing token granted. Never expires."""
        return f"{self.tag}:fence"

    @property
    def value(self) -> str:
        """A hash: the protected value and the token it was written with."""
        return f"{self.tag}:value"

    @property
    def protected(self) -> tuple[str, ...]:
        """Every hash whose `token` a new holder's must exceed."""
        return (self.value,) if self.object_pointer is None else (self.value, self.object_pointer)


@dataclass(frozen=True, slots=True)
class StreamKeys:
    """Where a stream is kept: all its keys have one hash tag."""

    prefix: str
    stream: StreamName

    @property
    def tag(self) -> str:
        return f"{{{self.prefix}/{self.stream.path}}}"

    @property
    def events(self) -> str:
        """The stream of entries."""
        return self.tag + _EVENTS

    @property
    def meta(self) -> str:
        """The head."""
        return f"{self.tag}:meta"

    @property
    def sizes(self) -> str:
        """What each entry counts."""
        return f"{self.tag}:sizes"

    @property
    def all(self) -> tuple[str, ...]:
        """The entries, the head, the groups and the sizes, as every stream script wants its keys."""
        return (self.events, self.meta, self.groups, self.sizes)

    @property
    def groups(self) -> str:
        """When each group gave its last sign of life."""
        return f"{self.tag}:groups"

    @property
    def messages(self) -> str:
        """The channel of a topic. No key."""
        return f"{self.tag}:messages"


def stream_pattern(prefix: str) -> str:
    """The glob pattern that the entries' keys of all streams match."""
    return _GLOB.sub(r"\\\1", f"{{{prefix}/") + "*}" + _EVENTS


def stream_of_key(prefix: str, key: bytes) -> StreamName | None:
    """The stream whose entries a key holds; None if it is not one of ours."""
    path = key.decode("utf-8", "replace").removeprefix(f"{{{prefix}/").removesuffix("}" + _EVENTS)
    parts = path.split("/")
    if len(parts) != 4 or not parts[3].isdecimal():
        return None
    namespace, component, topic = map(decode_segment, parts[:3])
    return StreamName(namespace, component, topic, int(parts[3]))


def format_lease(lease: LeaseId | None) -> str:
    """A lease as scripts and log entries name it: lowercase hexadecimal, empty for none."""
    return "" if lease is None else format_instance_id(lease)


def parse_lease(text: bytes) -> LeaseId | None:
    """The reverse of `format_lease`."""
    return LeaseId(int(text, 16)) if text else None


def check_prefix(prefix: str) -> str:
    """A prefix that can be watched: as a key, but it may be empty. Raises ConfigError."""
    return check_key(prefix) if prefix else prefix


def check_key(key: str) -> str:
    """A key that the registry can hold: text without NUL, of 1 to `KEY_MAX_BYTES`. Raises ConfigError."""
    try:
        fits = 0 < len(key.encode()) <= KEY_MAX_BYTES and "\0" not in key
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise ConfigError(
            f"{key[:80]!r} cannot be a registry key: write 1 to {KEY_MAX_BYTES} bytes of text without NUL"
        )
    return key


def check_value(value: bytes) -> bytes:
    """A value that the registry takes: up to `VALUE_MAX_BYTES`. Raises ConfigError."""
    if len(value) > VALUE_MAX_BYTES:
        raise ConfigError(
            f"a value of {len(value):,} bytes is too large for the registry, which takes {VALUE_MAX_BYTES:,}:"
            " put it into the object store"
        )
    return value


def check_transaction(count: int, value_bytes: int) -> None:
    """Raise ConfigError for more comparisons and operations, or bytes to write, than a transaction takes."""
    if count > TRANSACTION_MAX_COUNT:
        raise ConfigError(
            f"a transaction of {count:,} comparisons and operations is too large, the registry takes"
            f" {TRANSACTION_MAX_COUNT:,}: split it"
        )
    if value_bytes > TRANSACTION_MAX_BYTES:
        raise ConfigError(transaction_too_large("writes", value_bytes))


def transaction_too_large(what: str, size_bytes: int) -> str:
    """A message: the transaction "writes" or "finds" too much."""
    return (
        f"a transaction that {what} {size_bytes:,} bytes is too large, the registry takes"
        f" {TRANSACTION_MAX_BYTES:,}: split it, or put large values into the object store"
    )
