"""Keys in Redis of the registry, objects, locks and event streams. `docs/redis-schema.md` describes each.

Keys that one script may touch share a hash tag, so that on a cluster they live on one node: `{prefix}` for
the registry, and a tag for each object, lock and stream.
"""

from __future__ import annotations

import re
from binascii import crc_hqx
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Literal

from dynamo_redis.errors import ConfigError
from dynamo_redis.names import decode_segment, encode_segment, format_instance_id
from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.event_base import StreamName

SCHEMA_MAJOR = "1"
SCHEMA_VERSION = SCHEMA_MAJOR
"""`major[.minor]`. Another major version is refused; a minor version only adds fields that may be ignored."""

STRUCTURES = ("meta", "kv", "idx", "leases", "lk", "lr", "log")
"""The registry's structures, in the order in which scripts get them as KEYS."""

KEY_MAX_BYTES = 1024
"""Longest key of the registry, in UTF-8."""

VALUE_MAX_BYTES = 1 << 20
"""Largest value of the registry: each stays in the change log for thousands of changes. Store larger ones as
objects."""

TRANSACTION_MAX_COUNT = 1000
"""Most comparisons and operations of one transaction together: Redis serves no other command meanwhile."""

TRANSACTION_MAX_BYTES = 2 << 20
"""Most bytes of the values that a transaction writes, and of the present records under its keys."""

ALWAYS_FIT_COUNT = 2
"""Largest number of operations that is never refused for its size: each value is `VALUE_MAX_BYTES` at
most."""

Inbox = Literal["requests", "replies"]
"""The two kinds of a process's stream on the redis plane: workers read requests, callers read replies."""

SLOTS_COUNT = 16_384
"""Slots of a cluster."""

_EVENTS = ":events"
_SALT = re.compile(r"~[0-9]+$")
_GLOB = re.compile(r"([*?\[\]\\^])")


@dataclass(frozen=True, slots=True)
class RegistryKeys:
    """The names of one registry's keys."""

    prefix: str

    def structure(self, name: str) -> str:
        """Return the key of one of `STRUCTURES`, for example `{dynamo}:meta`."""
        return f"{{{self.prefix}}}:{name}"

    @property
    def structures(self) -> tuple[str, ...]:
        """Keys of all `STRUCTURES`, in the order of the scripts' KEYS."""
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
        """Return the key whose expiry announces a lease's end."""
        return self.structure(f"lease:{format_lease(lease)}")

    @property
    def lease_channel(self) -> str:
        """Pattern of the keyspace notifications of all leases' keys (database 0)."""
        literal = "".join(f"\\{char}" if char in "*?[]\\" else char for char in self.structure("lease:"))
        return f"__keyspace@0__:{literal}*"


@dataclass(frozen=True, slots=True)
class ObjectKeys:
    """The keys of an object, all with one hash tag. Raises ValueError for an empty name."""

    prefix: str
    bucket: str
    name: str

    def __post_init__(self) -> None:
        if not self.bucket or not self.name:
            raise ValueError(f"an object has a bucket and a name, not {self.bucket!r} and {self.name!r}")

    @property
    def path(self) -> str:
        """Name of the object in the index: `<bucket>/<name>`, both percent-encoded."""
        return f"{encode_segment(self.bucket)}/{encode_segment(self.name)}"

    @property
    def url(self) -> str:
        return f"redis-object://{self.bucket}/{self.name}"

    @property
    def current(self) -> str:
        """Pointer to the current version: a hash that holds its manifest."""
        return f"{{{self.prefix}/object/{self.path}}}:current"

    @property
    def damaged(self) -> str:
        """Set of the names of chunks that a reader found damaged: the next put sends them again."""
        return f"{{{self.prefix}/object/{self.path}}}:damaged"

    def chunk(self, name: str) -> str:
        """Return the key of a chunk, by the name that `chunk_name` gives it."""
        return f"{{{self.prefix}/object/{self.path}}}:chunk:{name}"

    def chunks(self, names: Sequence[str]) -> list[str]:
        """Return the keys of several chunks."""
        return [self.chunk(name) for name in names]

    def done(self, version: str) -> str:
        """Return the key of the mark that a commit leaves: it took effect, even if the object was replaced
        since."""
        return f"{{{self.prefix}/object/{self.path}}}:done:{version}"

    def claim(self, name: str) -> str:
        """Return the key of the claim on a chunk: the upload that is sending it."""
        return f"{{{self.prefix}/object/{self.path}}}:claim:{name}"

    @classmethod
    def of_path(cls, prefix: str, path: str) -> ObjectKeys:
        """Return the keys of the object with that `path`. Raises ValueError."""
        bucket, _, name = path.partition("/")
        return cls(prefix, decode_segment(bucket), decode_segment(name))


@dataclass(frozen=True, slots=True)
class LockKeys:
    """The name and keys of a lock, all with one hash tag.

    `object_pointer` is the key of the manifest that the lock of an object protects beside its own value.
    """

    name: str
    tag: str
    object_pointer: str | None = None

    @classmethod
    def of_name(cls, prefix: str, name: str) -> LockKeys:
        """Return the keys of a named lock. Raises ConfigError for an empty name."""
        if not name:
            raise ConfigError("a lock has a name, not ''")
        return cls(name, f"{{{prefix}/lock/{encode_segment(name)}}}")

    @classmethod
    def of_object(cls, prefix: str, bucket: str, name: str) -> LockKeys:
        """Return the keys of an object's lock, in that object's tag. Raises ValueError for an empty name."""
        keys = ObjectKeys(prefix, bucket, name)
        return cls(keys.url, f"{{{prefix}/object/{keys.path}}}", keys.current)

    @property
    def lock(self) -> str:
        """Hash that describes the holder. It exists, with the lock's TTL, while the lock is held."""
        return f"{self.tag}:lock"

    @property
    def fence(self) -> str:
        """The last fencing token granted; never expires."""
        return f"{self.tag}:fence"

    @property
    def value(self) -> str:
        """Hash of the protected value and the token it was written with."""
        return f"{self.tag}:value"

    @property
    def protected(self) -> tuple[str, ...]:
        """Hashes whose `token` the token of a new holder must exceed."""
        return (self.value,) if self.object_pointer is None else (self.value, self.object_pointer)


@dataclass(frozen=True)
class StreamKeys:
    """The keys of an event stream, all with one hash tag. Each is computed once: an append needs several."""

    prefix: str
    stream: StreamName

    @cached_property
    def tag(self) -> str:
        """The hash tag. That of a shard is chosen by its slot: the shards divide the slots of a cluster
        evenly, as its masters do."""
        path, shard, shards_count = self.stream.path, self.stream.shard, self.stream.shards_count
        tags = (f"{self.prefix}/{path}{'~' * bool(salt)}{salt or ''}" for salt in count())
        if shards_count > 1:
            tags = (tag for tag in tags if slot_of_tag(tag) * shards_count // SLOTS_COUNT == shard)
        return f"{{{next(tags)}}}"

    @cached_property
    def events(self) -> str:
        """The stream of entries."""
        return self.tag + _EVENTS

    @cached_property
    def meta(self) -> str:
        """Hash of the stream's head."""
        return f"{self.tag}:meta"

    @cached_property
    def sizes(self) -> str:
        """List of the event count and size of each entry."""
        return f"{self.tag}:sizes"

    @cached_property
    def all(self) -> tuple[str, ...]:
        """Keys of the entries, the head, the groups and the sizes, in the order of the scripts' KEYS."""
        return (self.events, self.meta, self.groups, self.sizes)

    @cached_property
    def groups(self) -> str:
        """Sorted set of each group's last sign of life."""
        return f"{self.tag}:groups"

    @cached_property
    def messages(self) -> str:
        """Pub/sub channel of a topic; not a key."""
        return f"{self.tag}:messages"


def inbox_key(prefix: str, kind: Inbox, address: str) -> str:
    """Return the stream of the messages to one process, by its address on the redis plane.

    An address is `<user>.<name>`: rules for users in Redis name the keys by their beginning.
    """
    return f"{{{prefix}/plane/{kind}/{address.replace('.', '/')}}}:inbox"


def inbox_pattern(prefix: str, kind: Inbox, user: str = "") -> str:
    """Return the pattern, as in Redis's rules for users, of the inboxes of a user's processes, or of all."""
    return f"{{{prefix}/plane/{kind}/{user}{'/' * bool(user)}*"


def stream_pattern(prefix: str) -> str:
    """Return the glob pattern of the keys that hold the entries of streams."""
    return _GLOB.sub(r"\\\1", f"{{{prefix}/") + "*}" + _EVENTS


def stream_of_key(prefix: str, key: bytes) -> StreamName | None:
    """Return the name of the stream whose entries a key holds; None for any other key."""
    tag = key.decode("utf-8", "replace").removeprefix(f"{{{prefix}/").removesuffix("}" + _EVENTS)
    return stream_of_tag(tag)


def stream_of_tag(tag: str) -> StreamName | None:
    """Return the stream whose keys have a hash tag, given without the prefix; None for any other tag."""
    return StreamName.of_path(_SALT.sub("", tag))


def key_patterns(prefix: str) -> tuple[str, str]:
    """Return the glob patterns that all keys of a deployment match, and no others."""
    escaped = _GLOB.sub(r"\\\1", prefix)
    return f"{{{escaped}}}:*", f"{{{escaped}/*"


def slot_of_tag(tag: str) -> int:
    """Return the slot of a cluster to which keys with this hash tag belong, as the cluster specification
    computes it: https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/"""
    return crc_hqx(tag.encode("utf-8", "surrogateescape"), 0) % SLOTS_COUNT


def format_lease(lease: LeaseId | None) -> str:
    """Return a lease as scripts and log entries write it: lowercase hexadecimal, empty for none."""
    return "" if lease is None else format_instance_id(lease)


def parse_lease(text: bytes) -> LeaseId | None:
    """Read the text that `format_lease` writes."""
    return LeaseId(int(text, 16)) if text else None


def check_prefix(prefix: str) -> str:
    """Return a prefix if it can be watched: a valid key, or empty. Raises ConfigError."""
    return check_key(prefix) if prefix else prefix


def check_key(key: str) -> str:
    """Return a key if it is valid: text without NUL, of 1 to `KEY_MAX_BYTES`. Raises ConfigError."""
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
    """Return a value if it is at most `VALUE_MAX_BYTES` long. Raises ConfigError."""
    if len(value) > VALUE_MAX_BYTES:
        raise ConfigError(
            f"a value of {len(value):,} bytes is too large for the registry, which takes {VALUE_MAX_BYTES:,}:"
            " put it into the object store"
        )
    return value


def check_transaction(count: int, value_bytes: int) -> None:
    """Raise ConfigError if a transaction has too many comparisons and operations, or bytes to write."""
    if count > TRANSACTION_MAX_COUNT:
        raise ConfigError(
            f"a transaction of {count:,} comparisons and operations is too large, the registry takes"
            f" {TRANSACTION_MAX_COUNT:,}: split it"
        )
    if value_bytes > TRANSACTION_MAX_BYTES:
        raise ConfigError(transaction_too_large("writes", value_bytes))


def transaction_too_large(what: str, size_bytes: int) -> str:
    """Return the message for a transaction that "writes" or "finds" (`what`) too many bytes."""
    return (
        f"a transaction that {what} {size_bytes:,} bytes is too large, the registry takes"
        f" {TRANSACTION_MAX_BYTES:,}: split it, or put large values into the object store"
    )
