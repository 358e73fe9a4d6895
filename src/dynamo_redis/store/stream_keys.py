"""The keys of one event stream, and the channel of one topic. `docs/redis-schema.md` describes each."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dynamo_redis.names import decode_segment
from dynamo_redis.store.event_base import StreamName

_EVENTS = ":events"
_GLOB = re.compile(r"([*?\[\]\\^])")


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
