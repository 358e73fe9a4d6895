"""The keys of one lock, and of what it protects. `docs/redis-schema.md` describes each."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_redis.errors import ConfigError
from dynamo_redis.names import encode_segment
from dynamo_redis.store.objects.manifest import ObjectKeys


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
