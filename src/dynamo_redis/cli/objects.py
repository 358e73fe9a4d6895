"""`dynamo-redis objects`: files in Redis."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click

from dynamo_redis.cli import connect
from dynamo_redis.cli.failures import CommandFailed, end_listing
from dynamo_redis.cli.formats import human_size, human_time
from dynamo_redis.cli.options import SettingsCommand, store_options
from dynamo_redis.cli.output import (
    json_option,
    print_json,
    print_line,
    print_reasons,
    print_table,
    progress_bar,
)
from dynamo_redis.errors import ConfigError, ObjectNotFound
from dynamo_redis.store.base import ObjectInfo, parse_object_url

_SCHEME = "redis-object://"
_PIECE_BYTES = 1 << 20


@click.group("objects")
def objects() -> None:
    """List, store, fetch and remove files in Redis.

    An object's name is BUCKET/NAME, or its URL redis-object://BUCKET/NAME. Replacing an object is atomic. A
    fetched file is checked against its sha256.

    \b
    Examples:
      dynamo-redis objects ls
      dynamo-redis objects put models/demo/tokenizer.json tokenizer.json
      dynamo-redis objects get models/demo/tokenizer.json - | sha256sum
    """


@objects.command("ls", cls=SettingsCommand)
@click.argument("bucket", required=False)
@json_option
@store_options
def ls(bucket: str | None, as_json: bool, **options: str | None) -> None:
    """List all objects, or those of BUCKET.

    \b
    Examples:
      dynamo-redis objects ls
      dynamo-redis objects ls models --json
    """

    unreadable: list[str] = []

    async def read() -> list[ObjectInfo]:
        async with connect.open_objects(options) as store:
            return await store.list(bucket, on_left_out=unreadable.append)

    found = connect.run(read())
    if as_json:
        print_json([*map(_object_json, found), *({"error": reason} for reason in unreadable)])
    else:
        now_s = time.time()
        rows = [
            [
                f"{info.bucket}/{info.name}",
                human_size(info.size_bytes),
                human_time(info.created_at, now_s),
                info.sha256[:16],
            ]
            for info in found
        ]
        print_table(["OBJECT", "SIZE", "CREATED", "SHA256"], rows, empty="no objects")
        print_reasons(unreadable)
    end_listing(len(unreadable), "object")


@objects.command("put", cls=SettingsCommand)
@click.argument("name", metavar="BUCKET/NAME")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@store_options
def put(name: str, file: Path, as_json: bool, **options: str | None) -> None:
    """Store FILE (`-`: standard input) as an object, or replace one.

    Content that Redis has already is not sent again.

    \b
    Example:
      dynamo-redis objects put adapters/fr.safetensors ./fr.safetensors
    """
    bucket, name = _split(name)
    standard_input = str(file) == "-"
    size_bytes = None if standard_input else file.stat().st_size

    async def read_standard_input() -> AsyncIterator[bytes]:
        while piece := sys.stdin.buffer.read(_PIECE_BYTES):  # it may block the loop: no other task runs
            yield piece

    async def write() -> ObjectInfo:
        with progress_bar(f"put {bucket}/{name}", size_bytes) as report:
            async with connect.open_objects(options, read_only=False) as store:
                source = read_standard_input() if standard_input else file
                return await store.put(bucket, name, source, progress=report)

    info = connect.run(write())
    if as_json:
        print_json([_object_json(info)])
    else:
        print_line(f"{info.url}  {human_size(info.size_bytes)}  sha256 {info.sha256}")


@objects.command("get", cls=SettingsCommand)
@click.argument("name", metavar="BUCKET/NAME")
@click.argument("file", type=click.Path(path_type=Path))
@store_options
def get(name: str, file: Path, **options: str | None) -> None:
    """Fetch an object into FILE, or to standard output if FILE is `-`. FILE appears only when it is complete.

    \b
    Examples:
      dynamo-redis objects get adapters/fr.safetensors ./fr.safetensors
      dynamo-redis objects get models/demo/config.json - | jq .
    """
    bucket, name = _split(name)
    if not file.parent.is_dir():  # checked before the object is fetched
        raise CommandFailed(f"{file.parent}: there is no such directory")

    async def print_content() -> None:
        async with connect.open_objects(options) as store:
            async for piece in store.get(bucket, name):
                sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()

    async def fetch() -> None:
        async with connect.open_objects(options) as store:
            info = await store.info(bucket, name)
            with progress_bar(f"get {bucket}/{name}", info.size_bytes if info else 0) as report:
                try:
                    await store.fetch(bucket, name, file, progress=report)
                except OSError as exc:  # its own text names a draft file beside FILE
                    raise CommandFailed(f"{file} cannot be written: {exc.strerror or exc}") from exc

    connect.run(print_content() if str(file) == "-" else fetch())


@objects.command("rm", cls=SettingsCommand)
@click.argument("name", metavar="BUCKET/NAME")
@json_option
@store_options
def rm(name: str, as_json: bool, **options: str | None) -> None:
    """Remove an object. Readers that have begun can finish.

    \b
    Example:
      dynamo-redis objects rm adapters/fr.safetensors
    """
    bucket, name = _split(name)

    async def remove() -> bool:
        async with connect.open_objects(options, read_only=False) as store:
            return await store.remove(bucket, name)

    if not connect.run(remove()):
        raise ObjectNotFound(f"{_SCHEME}{bucket}/{name}")
    if as_json:
        print_json([{"bucket": bucket, "name": name, "removed": True}])


def _split(name: str) -> tuple[str, str]:
    """Return the bucket and the name of `bucket/name` or of an object URL. Raises ConfigError."""
    try:
        return parse_object_url(name if name.startswith(_SCHEME) else f"{_SCHEME}{name}")
    except ValueError:
        raise ConfigError(f"{name!r} does not name an object: write BUCKET/NAME") from None


def _object_json(info: ObjectInfo) -> dict[str, Any]:
    return {
        "bucket": info.bucket,
        "name": info.name,
        "url": info.url,
        "size_bytes": info.size_bytes,
        "sha256": info.sha256,
        "chunk_count": info.chunk_count,
        "created_at": info.created_at,
    }
