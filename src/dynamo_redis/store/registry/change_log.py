"""What the registry's change log and its records look like, as values. Pure.

Each entry names its predecessor by id *and* operation, since after a failover to a slower clock the same id
can come twice. A reader that sees an entry whose predecessor is not the last one it saw has lost history.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgpack

from dynamo_redis.decoding import removal
from dynamo_redis.errors import ConfigError, InvalidRecord
from dynamo_redis.store.base import Delete, DeleteCause, LeaseId, Put, Record, Revision
from dynamo_redis.store.keys import parse_lease

ChangeKind = Literal["p", "d", "r", "x", "i"]
"""put, deleted, revoked, expired, new incarnation."""

CAUSES: Final = {"d": DeleteCause.DELETED, "r": DeleteCause.REVOKED, "x": DeleteCause.EXPIRED}


@dataclass(frozen=True, slots=True)
class Position:
    """A point in a registry's history: which registry, its last change, and the operation that made it."""

    incarnation: str
    revision: Revision
    operation: str


@dataclass(slots=True)  # one an entry in every process: to be frozen would cost four times as much
class Change:
    """One entry of the change log. Nobody changes it: all watches share it.

    `record` is what a put wrote, None otherwise. `previous` is (revision, operation) of the entry before.
    """

    revision: Revision
    kind: ChangeKind
    key: str
    lease: LeaseId | None
    operation: str
    previous: tuple[Revision, str]
    record: Record | None = None
    incarnation: str | None = None

    @property
    def event(self) -> Put | Delete | None:
        """What a watcher sees of it; None for an entry that changes no key."""
        if self.record is not None:
            return Put(self.record)
        cause = CAUSES.get(self.kind)
        return None if cause is None else Delete(self.key, self.revision, cause)


_REVISION: Final = re.compile(r"(?:0|[1-9][0-9]*)-(?:0|[1-9][0-9]*)")


def order(revision: Revision) -> tuple[int, int]:
    """Sorts revisions of *one* history. Across a lost tail only equality means anything."""
    milliseconds, _, counter = revision.partition("-")
    return int(milliseconds), int(counter or 0)


def is_revision(text: str) -> bool:
    """Whether a text has the form of a revision."""
    return _REVISION.fullmatch(text) is not None


def check_revision(revision: Revision) -> Revision:
    """A revision that some registry may have answered. Raises ConfigError."""
    if not is_revision(revision) or max(order(revision)) >= 1 << 64:
        raise ConfigError(f"{revision!r} is not a revision: give one that a write or a watch answered")
    return revision


_NAMES: Final = [b"o", b"k", b"v", b"l", b"c", b"n", b"w", b"p", b"q"]


def parse_change(entry_id: bytes, fields: list[bytes]) -> Change:
    """Read a log entry. Raises InvalidRecord for an entry this package did not write."""
    try:
        if fields[::2] != _NAMES:  # a later release may add some, in whatever order
            named = dict(zip(fields[::2], fields[1::2], strict=True))
            fields = [part for name in _NAMES for part in (name, named[name])]
        _, kind_, _, key_, _, value, _, lease_, _, created, _, version, _, operation, _, before, _, its = (
            fields
        )
        revision, lease = Revision(entry_id.decode()), parse_lease(lease_)
        kind: Any = kind_.decode()
        key = key_.decode()
        record = None
        if kind == "p":
            create_revision = Revision(created.decode()) if created else revision
            record = Record(key, value, create_revision, revision, int(version), lease)
        return Change(
            revision=revision,
            kind=kind,
            key=key,
            lease=lease,
            operation=operation.decode(),
            previous=(Revision(before.decode()), its.decode()),
            record=record,
            incarnation=value.decode() if kind == "i" else None,
        )
    except (KeyError, ValueError) as exc:
        raise InvalidRecord("an entry of the change log", repr(exc), key=entry_id.decode()) from exc


def size_bytes(changes: Sequence[Change]) -> int:
    """How many bytes of values are in them."""
    return sum(len(change.record.value) for change in changes if change.record is not None)


def parse_record(key: str, packed: bytes) -> Record | None:
    """Read a packed record, as scripts answer it; None for the empty answer "there is none".

    Raises InvalidRecord for one that no script wrote. Fields of a later minor, at its end, are ignored.
    """
    try:
        return _record(key, *msgpack.unpackb(packed, raw=True)) if packed else None
    except Exception as exc:  # msgpack has many, and a hash that others write has what they like
        reason = f"no script of the registry wrote it: {exc!r}"
        raise InvalidRecord("a record of the registry", reason, key=key, remedy=removal(key)) from exc


def parse_records(pairs: Sequence[bytes], into: dict[str, Record], invalid: dict[str, InvalidRecord]) -> None:
    """Read a page of key, packed record, key, packed record, … Those that cannot be read go to `invalid`."""
    records = msgpack.Unpacker(raw=True, max_buffer_size=0)
    records.feed(b"".join(pairs[1::2]))
    try:
        for raw_key, fields in zip(pairs[::2], records, strict=True):
            key = raw_key.decode()
            into[key] = _record(key, *fields)
    except Exception:  # noqa: BLE001 - one of them is damaged: which one?
        _parse_one_by_one(pairs, into, invalid)


def _parse_one_by_one(
    pairs: Sequence[bytes], into: dict[str, Record], invalid: dict[str, InvalidRecord]
) -> None:
    for raw_key, packed in zip(pairs[::2], pairs[1::2], strict=True):
        key = raw_key.decode("utf-8", "backslashreplace")
        into.pop(key, None)
        try:
            record = parse_record(key, packed)
        except InvalidRecord as exc:
            invalid[key] = exc
        else:
            if record is not None:
                into[key] = record


def _record(
    key: str,
    modified: bytes,
    created: bytes,
    version: float,
    lease: bytes,
    value: bytes,
    *_later: object,
) -> Record:
    if type(value) is not bytes or not modified.replace(b"-", b"", 1).isdigit():
        raise TypeError("its fields are others")
    mod_revision = Revision(modified.decode())
    create_revision = mod_revision if created == modified else Revision(created.decode())
    return Record(key, value, create_revision, mod_revision, int(version), parse_lease(lease))
