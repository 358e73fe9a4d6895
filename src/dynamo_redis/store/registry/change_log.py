"""Entries of the registry's change log, and its records, as values. Pure.

Each entry names its predecessor by id *and* operation, since after a failover to a slower clock the same id
can occur twice. A reader has lost history if an entry's predecessor is not the last entry that it read.
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
"""Put, deleted, revoked, expired, new incarnation."""

CAUSES: Final = {"d": DeleteCause.DELETED, "r": DeleteCause.REVOKED, "x": DeleteCause.EXPIRED}


@dataclass(frozen=True, slots=True)
class Position:
    """A point in a registry's history: its incarnation, its last change, and the operation of that change."""

    incarnation: str
    revision: Revision
    operation: str


@dataclass(slots=True)  # not frozen, which would make it four times as slow: each process makes one an entry
class Change:
    """One entry of the change log. Never changed, since all watches share it.

    `record` is the record that a put wrote, else None. `previous` is (revision, operation) of the entry
    before.
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
        """The event for watchers; None for an entry that changes no key."""
        if self.record is not None:
            return Put(self.record)
        cause = CAUSES.get(self.kind)
        return None if cause is None else Delete(self.key, self.revision, cause)


_REVISION: Final = re.compile(r"(?:0|[1-9][0-9]*)-(?:0|[1-9][0-9]*)")


def order(revision: Revision) -> tuple[int, int]:
    """Return the sort key of a revision. Only revisions of *one* history can be ordered, not across a lost
    tail."""
    milliseconds, _, counter = revision.partition("-")
    return int(milliseconds), int(counter or 0)


def is_revision(text: str) -> bool:
    """Return whether a text has the form of a revision."""
    return _REVISION.fullmatch(text) is not None


def check_revision(revision: Revision) -> Revision:
    """Return a revision if its form is valid. Raises ConfigError."""
    if not is_revision(revision) or max(order(revision)) >= 1 << 64:
        raise ConfigError(f"{revision!r} is not a revision: give one that a write or a watch answered")
    return revision


_NAMES: Final = [b"o", b"k", b"v", b"l", b"c", b"n", b"w", b"p", b"q"]


def parse_change(entry_id: bytes, fields: list[bytes]) -> Change:
    """Read a log entry. Raises InvalidRecord for an entry this package did not write."""
    try:
        if fields[::2] != _NAMES:  # a later release may add fields, in any order
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
    """Return the size of all values in changes."""
    return sum(len(change.record.value) for change in changes if change.record is not None)


def parse_record(key: str, packed: bytes) -> Record | None:
    """Read a packed record from a script's answer; return None for the empty answer, which means absent.

    Raises InvalidRecord for a value that no script wrote. Further fields of a later minor version are
    ignored.
    """
    try:
        return _record(key, *msgpack.unpackb(packed, raw=True)) if packed else None
    except Exception as exc:  # msgpack raises many kinds, and another program may have written any value
        reason = f"no script of the registry wrote it: {exc!r}"
        raise InvalidRecord("a record of the registry", reason, key=key, remedy=removal(key)) from exc


def parse_records(pairs: Sequence[bytes], into: dict[str, Record], invalid: dict[str, InvalidRecord]) -> None:
    """Read a page of key, packed record, key, packed record, … Unreadable ones go to `invalid`."""
    records = msgpack.Unpacker(raw=True, max_buffer_size=0)
    records.feed(b"".join(pairs[1::2]))
    try:
        for raw_key, fields in zip(pairs[::2], records, strict=True):
            key = raw_key.decode()
            into[key] = _record(key, *fields)
    except Exception:  # noqa: BLE001 - one of them is damaged: read them one by one to find it
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
