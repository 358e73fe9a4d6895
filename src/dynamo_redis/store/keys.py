"""The registry's keys in Redis. `docs/redis-schema.md` describes each; a test holds the two together.

All share the hash tag `{prefix}`, so that on a cluster they live on one node and one script may touch them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_redis.errors import ConfigError
from dynamo_redis.names import format_instance_id
from dynamo_redis.store.base import LeaseId

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
