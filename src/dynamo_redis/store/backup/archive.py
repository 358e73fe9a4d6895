"""The file of a backup: a ZIP archive without compression, which `unzip` opens and `sha256sum -c` checks.

    objects/<n>      the content of an object
    records.jsonl    a JSON object a line: `key`, `value` (base64), and `lease` (hexadecimal, or null)
    manifest.json    `format`, `version`, `prefix`, `created_at`, `release`, and for each of `objects` its
                     `bucket`, `name`, `size_bytes`, `sha256` and `member`
    SHA256SUMS       the SHA-256 of each member above, as `sha256sum` writes it; the last member

`version` is `<major>.<minor>`. A minor version adds fields and members, which earlier releases ignore.
Another major version is refused. Nothing is read into memory but the manifest, and one record or piece at a
time.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import secrets
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from dynamo_redis.decoding import read_json_object
from dynamo_redis.errors import InvalidRecord, SchemaMismatch
from dynamo_redis.names import format_instance_id
from dynamo_redis.store.base import ObjectInfo, Progress, Record
from dynamo_redis.store.keys import VALUE_MAX_BYTES, check_key, check_value

FORMAT: Final = "dynamo-redis backup"
MAJOR: Final = "1"
VERSION: Final = f"{MAJOR}.0"

MANIFEST_MAX_BYTES: Final = 256 << 20
"""Largest manifest, and list of sums, that is read: of a million objects."""

_MANIFEST: Final = "manifest.json"
_RECORDS: Final = "records.jsonl"
_SUMS: Final = "SHA256SUMS"
_PIECE_BYTES: Final = 1 << 20
_LINE_MAX_BYTES: Final = 2 * VALUE_MAX_BYTES
_WHAT: Final = "a whole backup of dynamo-redis"
_DAMAGE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,  # an encrypted member
    TypeError,
    ValueError,
    struct.error,
)
"""What zipfile and the decoders raise for a damaged file."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in a backup. `member` is the archive's member with its content."""

    bucket: str
    name: str
    size_bytes: int
    sha256: str
    member: str

    @property
    def path(self) -> str:
        return f"{self.bucket}/{self.name}"


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record in a backup. `lease` is its lease in hexadecimal; None if it stays without its process."""

    key: str
    value: bytes = field(repr=False)
    lease: str | None


class BackupWriter:
    """Writes a backup beside its path, readable by its user alone, and renames it when it is whole."""

    def __init__(self, path: Path, *, prefix: str, created_at: str, release: str) -> None:
        self._path = path
        self._draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        self._about = {"prefix": prefix, "created_at": created_at, "release": release}
        self._objects: list[StoredObject] = []
        self._sums: dict[str, str] = {}
        self._members_count = 0

    def __enter__(self) -> Self:
        """Make the file. Raises OSError."""
        descriptor = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        """Complete the file, or remove it after an error. Raises OSError."""
        try:
            if kind is None:
                self._complete()
        finally:
            with suppress(OSError, ValueError):
                self._zip.close()
            self._file.close()
            self._draft.unlink(missing_ok=True)  # no effect once it is renamed

    def add_records(self, records: Iterable[Record]) -> None:
        """Add the registry's records. Called once."""
        with self._member(_RECORDS) as write:
            for record in records:
                lease = None if record.lease is None else format_instance_id(record.lease)
                line = {"key": record.key, "lease": lease, "value": base64.b64encode(record.value).decode()}
                write(json.dumps(line).encode() + b"\n")

    @contextmanager
    def add_object(self, info: ObjectInfo) -> Iterator[Callable[[bytes], None]]:
        """Add an object; its content is written to the yielded function. After an error it is not listed."""
        member = f"objects/{self._members_count}"
        self._members_count += 1
        with self._member(member) as write:
            yield write
        if self._sums[member] != info.sha256:
            del self._sums[member]
            raise InvalidRecord("the content that its manifest names", "it has another sha256", key=info.url)
        self._objects.append(StoredObject(info.bucket, info.name, info.size_bytes, info.sha256, member))

    @contextmanager
    def _member(self, name: str) -> Iterator[Callable[[bytes], None]]:
        whole = hashlib.sha256()
        with self._zip.open(name, "w", force_zip64=True) as file:

            def write(piece: bytes) -> None:
                whole.update(piece)
                file.write(piece)

            yield write
        self._sums[name] = whole.hexdigest()

    def _complete(self) -> None:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **self._about,
            "objects": [asdict(each) for each in self._objects],
        }
        with self._member(_MANIFEST) as write:
            write(json.dumps(manifest, indent=1).encode())
        sums = "".join(f"{digest}  {name}\n" for name, digest in self._sums.items())
        self._zip.writestr(_SUMS, sums)
        self._zip.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._draft.replace(self._path)
        _sync_directory(self._path.parent)


class BackupReader:
    """Reads a backup. `verify` comes first: it checks every byte, and nothing else here is to be trusted
    before."""

    def __init__(self, path: Path) -> None:
        """Open the file, and read its manifest. Raises OSError, InvalidRecord; SchemaMismatch for another
        major version."""
        self._path = path
        self._file = path.open("rb")
        try:
            with self._reading():
                self._zip = zipfile.ZipFile(self._file)
                self._sums = self._read_sums()
                self.manifest = read_json_object(self._read(_MANIFEST), _WHAT)
                self._check_version()
                self.objects = tuple(map(_object_of, _list_of(self.manifest, "objects")))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._zip.close()
        self._file.close()

    @property
    def size_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(each.size_bytes for each in self.objects)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return os.fstat(self._file.fileno()).st_size

    def verify(self, progress: Progress | None = None) -> None:
        """Read everything, and compare each member with its sum and each record with what a registry takes.

        Raises InvalidRecord, and OSError if the file cannot be read."""
        with self._reading():
            for each in self.objects:
                if self._sums.get(each.member) != each.sha256:
                    raise ValueError(f"{_SUMS} and {_MANIFEST} differ on {each.path}")
            done_bytes = 0
            for name, digest in self._sums.items():
                whole = hashlib.sha256()
                for piece in self._pieces(name):
                    whole.update(piece)
                    done_bytes += len(piece)
                    if progress is not None:
                        progress(done_bytes, self.file_bytes)
                if whole.hexdigest() != digest:
                    raise ValueError(f"{name} does not have the sha256 that {_SUMS} names")
            seen: set[str] = set()
            for record in self._records():
                check_key(record.key)
                check_value(record.value)
                if record.key in seen:
                    raise ValueError(f"{_RECORDS} has {record.key} twice")
                seen.add(record.key)
            if len({each.path for each in self.objects}) != len(self.objects):
                raise ValueError(f"{_MANIFEST} has an object twice")

    def records(self) -> Iterator[StoredRecord]:
        """Yield the records. Raises InvalidRecord."""
        with self._reading():
            yield from self._records()

    def pieces(self, stored: StoredObject) -> Iterator[bytes]:
        """Yield an object's content. Raises InvalidRecord."""
        with self._reading():
            yield from self._pieces(stored.member)

    def _records(self) -> Iterator[StoredRecord]:
        with self._zip.open(self._stored(_RECORDS)) as file:
            while line := file.readline(_LINE_MAX_BYTES):
                found = read_json_object(line, f"a record in {_RECORDS}")
                key, lease, value = found["key"], found.get("lease"), found["value"]
                if not isinstance(key, str) or not isinstance(lease, str | None):
                    raise ValueError(f"{_RECORDS} has a record without a key")
                yield StoredRecord(key, base64.b64decode(value, validate=True), lease)

    def _pieces(self, name: str) -> Iterator[bytes]:
        with self._zip.open(self._stored(name)) as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece

    def _read(self, name: str) -> bytes:
        member = self._stored(name)
        if member.file_size > MANIFEST_MAX_BYTES:
            raise ValueError(f"{name} has {member.file_size} bytes")
        return self._zip.read(member)

    def _stored(self, name: str) -> zipfile.ZipInfo:
        member = self._zip.getinfo(name)
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ValueError(f"{name} is compressed")
        return member

    def _read_sums(self) -> dict[str, str]:
        sums: dict[str, str] = {}
        for line in self._read(_SUMS).decode().splitlines():
            digest, _, name = line.partition("  ")
            sums[name] = digest
        if not {_MANIFEST, _RECORDS} <= sums.keys():
            raise ValueError(f"{_SUMS} does not name {_MANIFEST} and {_RECORDS}")
        return sums

    def _check_version(self) -> None:
        found_format, version = self.manifest.get("format"), self.manifest.get("version")
        if found_format != FORMAT or not isinstance(version, str):
            raise ValueError(f"its format is {found_format!r}")
        if version.partition(".")[0] != MAJOR:
            remedy = "restore it with the release that wrote it, which its manifest.json names"
            raise SchemaMismatch("the backup", version, MAJOR, key=str(self._path), remedy=remedy)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn every error of a damaged file into InvalidRecord, with the file's name."""
        try:
            yield
        except SchemaMismatch:
            raise
        except InvalidRecord as exc:
            raise InvalidRecord(_WHAT, exc.reason, key=str(self._path)) from exc
        except _DAMAGE as exc:
            reason = f"{exc.args[0]}" if isinstance(exc, KeyError) else str(exc) or type(exc).__name__
            raise InvalidRecord(_WHAT, reason, key=str(self._path)) from exc
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            raise InvalidRecord(_WHAT, "a place that it names is not in it", key=str(self._path)) from exc


def _list_of(fields: dict[str, Any], name: str) -> list[Any]:
    found = fields.get(name)
    if not isinstance(found, list):
        raise ValueError(f"{_MANIFEST} has no list {name!r}")
    return found


def _object_of(fields: Any) -> StoredObject:
    found = StoredObject(*(fields[name] for name in ("bucket", "name", "size_bytes", "sha256", "member")))
    texts = (found.bucket, found.name, found.sha256, found.member)
    if not all(type(text) is str and text for text in texts) or type(found.size_bytes) is not int:
        raise ValueError(f"{_MANIFEST} has an object that is not one")
    return found


def _sync_directory(directory: Path) -> None:
    """Make a rename last through a power loss, where the system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
