"""The download of a model's files from the object store to a cache directory of a frontend."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import anyio.to_thread

from dynamo_redis.errors import ModelCacheError, ModelError, ObjectChanged
from dynamo_redis.models.card import FileReference, ModelCard
from dynamo_redis.store.base import ObjectStore, Progress, parse_object_url


async def fetch_model_files(objects: ObjectStore, card: ModelCard, cache_dir: Path) -> Path:
    """Return a directory with the card's files; download those that `cache_dir` does not have.

    The cache is addressed by content: `blobs/<sha256>`, and for each set of files a directory of links,
    `models/<digest of the set>`, which is returned. Any number of processes may share the cache: a blob is
    moved there when it is complete and checked, and a damaged one is fetched again.

    Raises ModelError for an unusable card, ModelCacheError if the cache directory cannot be written,
    ObjectChanged if the object store has other content than the card says, and StoreError.
    """
    wanted = card.checked_files()
    blobs = cache_dir / "blobs"
    try:
        blobs.mkdir(parents=True, exist_ok=True)
        for reference in wanted.values():
            blob = blobs / reference.sha256
            if await anyio.to_thread.run_sync(_is_whole, blob, reference):
                continue
            try:
                bucket, name = parse_object_url(reference.url)
            except ValueError as exc:
                raise ModelError(str(exc)) from exc
            draft = blob.with_name(f"{blob.name}.{os.getpid()}.{secrets.token_hex(4)}")
            try:
                info = await objects.fetch(bucket, name, draft, progress=_refusing_others(reference))
                if not await anyio.to_thread.run_sync(_is_whole, draft, reference):
                    raise ObjectChanged(
                        reference.url,
                        f"it has {info.size_bytes} bytes and sha256 {info.sha256[:16]}…, "
                        f"the card says {reference.size_bytes} and {reference.sha256[:16]}…",
                    )
                draft.replace(blob)
            finally:
                draft.unlink(missing_ok=True)
        return _link(cache_dir, wanted)
    except OSError as exc:
        raise ModelCacheError(f"cannot write the model cache {cache_dir}: {exc.strerror or exc}") from exc


def _refusing_others(reference: FileReference) -> Progress:
    """Return a check that ends the download of an object of another size than the card's at its first piece.

    Such a file would be discarded at its end, and could fill the disk before.
    """

    def check(_: int, total_bytes: int | None) -> None:
        if total_bytes != reference.size_bytes:
            reason = f"it has {total_bytes} bytes in Redis, the card says {reference.size_bytes}"
            raise ObjectChanged(reference.url, reason)

    return check


def _is_whole(path: Path, reference: FileReference) -> bool:
    """Return whether the file exists with the size and sha256 of the card. Blocks."""
    try:
        if path.stat().st_size != reference.size_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == reference.sha256
    except FileNotFoundError:
        return False


def _link(cache_dir: Path, wanted: Mapping[str, FileReference]) -> Path:
    """Make the directory of links to the blobs of this set of files, and return it."""
    listing = "".join(f"{name} {reference.sha256}\n" for name, reference in sorted(wanted.items()))
    directory = cache_dir / "models" / hashlib.sha256(listing.encode()).hexdigest()[:32]
    for name, reference in wanted.items():
        link = directory / name
        link.parent.mkdir(parents=True, exist_ok=True)
        draft = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
        draft.symlink_to(os.path.relpath(cache_dir / "blobs" / reference.sha256, link.parent))
        draft.replace(link)
    return directory
