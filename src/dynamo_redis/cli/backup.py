"""`dynamo-redis backup` and `restore`: the lasting content of a deployment in one file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from dynamo_redis import __version__
from dynamo_redis.cli import connect
from dynamo_redis.cli.failures import CommandFailed, end_listing
from dynamo_redis.cli.formats import human_size
from dynamo_redis.cli.options import SettingsCommand, load, store_options
from dynamo_redis.cli.output import json_option, print_json, print_line, print_reasons, progress_bar
from dynamo_redis.config import StoreSettings
from dynamo_redis.router.index.snapshotter import SNAPSHOT_BUCKET
from dynamo_redis.store.backup.archive import BackupReader, BackupWriter
from dynamo_redis.store.backup.restoring import OnConflict, Restoration, Restored
from dynamo_redis.store.backup.saving import Saved, save

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("backup", cls=SettingsCommand)
@click.argument("file", type=_FILE)
@click.option("--objects/--no-objects", "with_objects", default=True, help="Objects too.  [default: yes]")
@click.option(
    "--leased/--no-leased",
    "with_leased",
    default=True,
    help="Records of live processes too, to look at; `restore` leaves them out. They hold the secrets of "
    "instances.  [default: yes]",
)
@json_option
@store_options
def backup(file: Path, with_objects: bool, with_leased: bool, as_json: bool, **options: str | None) -> None:
    """Write the registry's records and all objects to FILE: a ZIP archive, with the sha256 of each part.

    The deployment may run meanwhile. The records are those of one moment; each object is whole, and verified.
    Snapshots of routers are left out: routers make them anew. FILE appears only when it is complete, and only
    its owner can read it, since it may hold secrets. Keep it so.

    Exit code 1: something could not be read; FILE has the rest.

    \b
    Examples:
      dynamo-redis backup dynamo.zip
      dynamo-redis backup records.zip --no-objects --no-leased
      unzip -p dynamo.zip records.jsonl | jq .key
    """
    if not file.absolute().parent.is_dir():
        raise CommandFailed(f"{file.parent}: there is no such directory")
    saved = connect.run(_save(file, with_objects, with_leased, options))
    if as_json:
        print_json([{"file": str(file), "size_bytes": file.stat().st_size, **asdict(saved)}])
    else:
        print_line(
            f"{file}: {saved.records_count} lasting records, {saved.leased_count} records of live processes, "
            f"{saved.objects_count} objects of {human_size(saved.objects_bytes)}"
        )
        print_reasons(saved.left_out)
    end_listing(len(saved.left_out), "record or object")


async def _save(file: Path, with_objects: bool, with_leased: bool, options: dict[str, str | None]) -> Saved:
    async with connect.open_registry(options) as registry:
        snapshot = await registry.get_prefix("")
    writer = BackupWriter(
        file,
        prefix=load(StoreSettings, options).prefix,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        release=__version__,
    )
    async with connect.open_objects(options) as objects:
        with _file_errors(file), writer, progress_bar(f"back up to {file.name}", None) as report:
            return await save(
                writer,
                snapshot,
                objects if with_objects else None,
                without_buckets={SNAPSHOT_BUCKET},
                with_leased=with_leased,
                progress=report,
            )


@click.command("restore", cls=SettingsCommand)
@click.argument("file", type=_FILE)
@click.option("--objects/--no-objects", "with_objects", default=True, help="Objects too.  [default: yes]")
@click.option(
    "--on-conflict",
    type=click.Choice(["fail", "keep", "replace"]),
    default="fail",
    show_default=True,
    help="If a key or an object exists with other content: write nothing, leave it, or replace it.",
)
@json_option
@store_options
def restore(
    file: Path, with_objects: bool, on_conflict: OnConflict, as_json: bool, **options: str | None
) -> None:
    """Write the lasting records and the objects of FILE, which `backup` wrote, to the registry.

    First all of FILE is verified; a damaged file is an error, and nothing is written. Then objects come, and
    then records. An interrupted restore is simply run again: what is there already is not sent again. The
    server may be of another kind: a single Redis, Sentinels, a cluster, Redis or Valkey.

    Records of processes are not restored: live processes write theirs by themselves.

    \b
    Examples:
      dynamo-redis restore dynamo.zip
      dynamo-redis restore dynamo.zip --on-conflict keep
      dynamo-redis restore dynamo.zip --redis-url redis+cluster://n1:6379,n2:6379 --redis-prefix copy
    """
    done = connect.run(_restore(file, with_objects, on_conflict, options))
    if as_json:
        print_json([{"file": str(file), **asdict(done)}])
    else:
        print_line(
            f"{file}: {done.records_count} records and {done.objects_count} objects restored; "
            f"{done.same_count} were there, {done.kept_count} kept as they were, "
            f"{done.leased_count} records of processes left out"
        )


async def _restore(
    file: Path, with_objects: bool, on_conflict: OnConflict, options: dict[str, Any]
) -> Restored:
    with _file_errors(file), BackupReader(file) as reader:
        with progress_bar(f"verify {file.name}", reader.file_bytes) as report:
            reader.verify(report)
        async with (
            connect.open_objects(options, read_only=False) as objects,
            connect.open_registry(options, read_only=False) as registry,
        ):
            restoration = Restoration(
                reader, registry, objects, with_objects=with_objects, on_conflict=on_conflict
            )
            await restoration.check_conflicts()
            with progress_bar(f"restore {file.name}", reader.size_bytes) as report:
                return await restoration.run(report)


@contextmanager
def _file_errors(file: Path) -> Iterator[None]:
    """Name FILE in an error of the file system, which may name a draft beside it."""
    try:
        yield
    except OSError as exc:
        raise CommandFailed(f"{file}: {exc.strerror or exc}") from exc
