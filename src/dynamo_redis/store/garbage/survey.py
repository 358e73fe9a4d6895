"""The findings of a survey of a deployment's keys: garbage by kind, unknown keys, and what was not judged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

UNKNOWN_SHOWN_COUNT: Final = 20
"""Most unknown keys that are kept by name; further ones are counted."""


class Kind(StrEnum):
    """A kind of garbage."""

    MODEL_FILES = "model files"
    SNAPSHOTS = "router snapshots"
    CHUNKS = "chunks"
    TEMPORARY = "temporary keys"
    LOCKS = "locks"
    STREAMS = "event streams"


REASONS: Final = {
    Kind.MODEL_FILES: "no model card names them",
    Kind.SNAPSHOTS: "the component has no workers and no routers",
    Kind.CHUNKS: "no version of an object has them",
    Kind.TEMPORARY: "their writer ended before it set their expiry",
    Kind.LOCKS: "not held, and nothing is stored under them",
    Kind.STREAMS: "the component has no workers and no routers",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to remove.

    `keys` and `arguments` are what its script gets. `size_bytes` is its content, without what Redis adds;
    `count` the number of keys of which it consists, for chunks.
    """

    kind: Kind
    name: str
    size_bytes: int
    keys: tuple[str, ...]
    arguments: tuple[str | int, ...] = ()
    count: int = 1


@dataclass(slots=True)
class Survey:
    """`unreadable` has a sentence for each key or record that kept something from being judged."""

    findings: list[Finding] = field(default_factory=list)
    keys_count: int = 0
    unknown: list[str] = field(default_factory=list)
    unknown_count: int = 0
    other_objects_count: int = 0
    unreadable: list[str] = field(default_factory=list)

    def add_unknown(self, key: str) -> None:
        """Count a key that is not known."""
        self.unknown_count += 1
        if len(self.unknown) < UNKNOWN_SHOWN_COUNT:
            self.unknown.append(key)

    def of_kind(self, kind: Kind) -> list[Finding]:
        """Return the findings of a kind."""
        return [finding for finding in self.findings if finding.kind == kind]

    def sort(self, kinds: Iterable[Kind] = tuple(Kind)) -> None:
        """Order the findings as they are to be removed: an object before its lock."""
        order = {kind: number for number, kind in enumerate(kinds)}
        self.findings.sort(key=lambda finding: (order[finding.kind], finding.name))
