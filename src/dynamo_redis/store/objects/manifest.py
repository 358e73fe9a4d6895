"""The manifest of an object, which its pointer holds. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_redis.errors import ObjectChanged, SchemaMismatch
from dynamo_redis.store.base import ObjectInfo
from dynamo_redis.store.keys import ObjectKeys

SCHEMA = "1"
_CODEC = "none"
_DIGEST_KIND = "sha256-prefix"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_EMPTY_DIGEST = hashlib.sha256().hexdigest()


def chunk_name(digest: str, chunk_bytes: int) -> str:
    """Return the name of a chunk, unique among all versions of an object with chunks of any size.

    The digest determines where a chunk ends, and its size where it begins.
    """
    return f"{chunk_bytes}:{digest}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version of an object. `version` is random: the same content put again later has a new one.

    All chunks but the last have `chunk_bytes`. `digests` has for each chunk the SHA-256, in hex, of the
    object up to that chunk's end. So one pass over the content computes all digests, and `sha256` is the last
    of them.
    """

    version: str
    size_bytes: int
    sha256: str
    chunk_bytes: int
    digests: tuple[str, ...]
    created_at_ms: int = 0  # by the server's clock, when it became current

    @property
    def chunks(self) -> list[str]:
        """Names of its chunks, in order."""
        return [chunk_name(digest, self.chunk_bytes) for digest in self.digests]

    def fields(self) -> list[str | int]:
        """Return fields and values of the pointer, `version` first; the server adds `created_at_ms`."""
        return [
            *("version", self.version, "v", SCHEMA, "size_bytes", self.size_bytes, "sha256", self.sha256),
            *("codec", _CODEC, "digest", _DIGEST_KIND),
            *("chunk_bytes", self.chunk_bytes, "chunk_count", len(self.digests)),
            *("chunks", " ".join(self.digests)),
        ]

    @classmethod
    def of_fields(cls, flat: Sequence[bytes], url: str) -> Manifest:
        """Read the pointer's fields and values; unknown ones are ignored.

        Raises SchemaMismatch for a manifest of an incompatible release, ObjectChanged for a damaged one.
        """
        found = _pairs(flat)
        _check_schema(found.get("v"), found.get("codec"), found.get("digest"))
        try:
            manifest = cls(
                version=found["version"].decode(),
                size_bytes=int(found["size_bytes"]),
                sha256=found["sha256"].decode(),
                chunk_bytes=int(found["chunk_bytes"]),
                digests=tuple(found["chunks"].decode().split()),
                created_at_ms=int(found["created_at_ms"]),
            )
        except (KeyError, ValueError) as exc:
            raise ObjectChanged(url, f"its manifest is damaged ({exc!r})") from exc
        last_bytes = manifest.size_bytes - (len(manifest.digests) - 1) * manifest.chunk_bytes
        is_consistent = (
            0 < last_bytes <= manifest.chunk_bytes
            and manifest.digests[-1] == manifest.sha256
            and all(map(_DIGEST.fullmatch, manifest.digests))
            if manifest.digests
            else manifest.size_bytes == 0 and manifest.sha256 == _EMPTY_DIGEST
        )
        if not is_consistent:
            raise ObjectChanged(url, "its manifest is damaged")
        return manifest

    def info(self, keys: ObjectKeys, created_at_ms: int) -> ObjectInfo:
        """Return the metadata that users see."""
        return ObjectInfo(
            bucket=keys.bucket,
            name=keys.name,
            size_bytes=self.size_bytes,
            sha256=self.sha256,
            chunk_count=len(self.digests),
            created_at=created_at_ms / 1000,
        )


@dataclass(frozen=True, slots=True)
class Replaceable:
    """The part of a manifest that is needed to replace or remove a version.

    It is less than what reading needs, so that a damaged manifest can be replaced. `chunks` are the names of
    the chunks that the manifest still lists."""

    version: str
    chunks: tuple[str, ...]

    @classmethod
    def of_fields(cls, flat: Sequence[bytes]) -> Replaceable | None:
        """Read the pointer's fields and values; None if there is no object.

        Raises SchemaMismatch for an incompatible release, whose chunks would be left behind.
        """
        if not flat:
            return None
        found = _pairs(flat)
        _check_schema(found.get("v"), found.get("codec"), found.get("digest"))
        digests = _DIGEST.findall(found.get("chunks", b"").decode("utf-8", "replace"))
        size = found.get("chunk_bytes", b"")
        chunks = [chunk_name(digest, int(size)) for digest in digests] if size.isdigit() else []
        return cls(found.get("version", b"").decode("utf-8", "surrogateescape"), tuple(chunks))


INFO_FIELDS = ("v", "codec", "digest", "size_bytes", "sha256", "chunk_count", "created_at_ms")
"""Fields of a pointer that a listing reads."""


def info_of_fields(values: Sequence[bytes | None], keys: ObjectKeys) -> ObjectInfo | None:
    """Read the values of `INFO_FIELDS`; None if there is no object. Raises as `Manifest.of_fields`."""
    schema, codec, digest_kind, size_bytes, sha256, chunk_count, created_at_ms = values
    if sha256 is None:
        return None
    _check_schema(schema, codec, digest_kind)
    try:
        return ObjectInfo(
            bucket=keys.bucket,
            name=keys.name,
            size_bytes=int(size_bytes or b""),
            sha256=sha256.decode(),
            chunk_count=int(chunk_count or b""),
            created_at=int(created_at_ms or b"") / 1000,
        )
    except ValueError as exc:
        raise ObjectChanged(keys.url, f"its manifest is damaged ({exc!r})") from exc


def _pairs(flat: Sequence[bytes]) -> dict[str, bytes]:
    return {flat[i].decode("utf-8", "replace"): flat[i + 1] for i in range(0, len(flat), 2)}


def _check_schema(schema: bytes | None, codec: bytes | None, digest_kind: bytes | None) -> None:
    found = [(value or b"absent").decode("utf-8", "replace") for value in (schema, codec, digest_kind)]
    if found != [SCHEMA, _CODEC, _DIGEST_KIND]:
        raise SchemaMismatch(
            "the object's manifest",
            f"{found[0]} with codec {found[1]} and digest {found[2]}",
            f"{SCHEMA} with codec {_CODEC} and digest {_DIGEST_KIND}",
        )
