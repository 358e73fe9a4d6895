"""`dynamo-redis get`, `put`, `del` and `watch`: the keys of the registry."""

from __future__ import annotations

import sys
from typing import Any

import click

from dynamo_redis.cli import connect
from dynamo_redis.cli.failures import CommandFailed, end_listing
from dynamo_redis.cli.formats import ShownValue, human_size, printable, show_value
from dynamo_redis.cli.options import SettingsCommand, store_options
from dynamo_redis.cli.output import json_option, print_json, print_json_line, print_line, print_table
from dynamo_redis.errors import InvalidRecord
from dynamo_redis.names import format_instance_id
from dynamo_redis.store.base import Put, Record

_secrets_option = click.option("--show-secrets", is_flag=True, help="Show the secrets of instances.")


@click.command("get", cls=SettingsCommand)
@click.argument("key", required=False)
@click.option("--prefix", "key_prefix", metavar="P", help="List the keys with this prefix; `''`: all keys.")
@click.option("--raw", is_flag=True, help="Print the stored bytes of KEY, and nothing else.")
@json_option
@_secrets_option
@store_options
def get(
    key: str | None,
    key_prefix: str | None,
    raw: bool,
    as_json: bool,
    show_secrets: bool,
    **options: str | None,
) -> None:
    """Print the value of KEY, or list all keys under a prefix.

    JSON is printed indented. A value that is not text is printed as base64, after `base64:`.

    \b
    Examples:
      dynamo-redis get v1/instances/dynamo/backend/generate/694d98147d54bfde
      dynamo-redis get --prefix v1/mdc/
      dynamo-redis get --prefix v1/ --json
    """
    if (key is None) == (key_prefix is None):
        raise click.UsageError("give either a KEY or --prefix")
    if raw and (key is None or as_json):
        raise click.UsageError("--raw needs one KEY, and cannot be combined with --json")

    async def read() -> tuple[tuple[Record, ...], tuple[InvalidRecord, ...]]:
        async with connect.open_registry(options) as registry:
            if key is None:
                snapshot = await registry.get_prefix(key_prefix or "")
                return snapshot.records, snapshot.invalid
            record = await registry.get(key)
        if record is None:
            raise _absent(key)
        return (record,), ()

    records, invalid = connect.run(read())
    if as_json:
        shown = [record_json(record, secrets=show_secrets) for record in records]
        print_json([*shown, *({"key": exc.key, "error": str(exc)} for exc in invalid)])
    elif key_prefix is not None:
        rows = [_record_row(record, secrets=show_secrets) for record in records]
        rows += [[exc.key, "", "", "", f"unreadable: {exc}"] for exc in invalid]
        columns = ["KEY", "SIZE", "WRITES", "LEASE", "VALUE"]
        print_table(columns, rows, empty=f"no keys under {key_prefix!r}", wrap="VALUE")
    elif raw:
        sys.stdout.buffer.write(records[0].value)
        sys.stdout.buffer.flush()
    else:
        print_line(printable(show_value(records[0].key, records[0].value, secrets=show_secrets).pretty()))
    end_listing(len(invalid), "record")


@click.command("put", cls=SettingsCommand)
@click.argument("key")
@click.argument("value")
@json_option
@store_options
def put(key: str, value: str, as_json: bool, **options: str | None) -> None:
    """Write KEY without a lease: it stays until it is deleted. If VALUE is `-`, standard input is read.

    Prints the revision of the change.

    \b
    Examples:
      dynamo-redis put app/motd '{"text": "hello"}'
      dynamo-redis put app/blob - < blob.bin
    """
    content = sys.stdin.buffer.read() if value == "-" else value.encode(errors="surrogateescape")

    async def write() -> str:
        async with connect.open_registry(options, read_only=False, default_level="error") as registry:
            return await registry.put(key, content)

    revision = connect.run(write())
    if as_json:
        print_json([{"key": key, "mod_revision": revision}])
    else:
        print_line(revision)


@click.command("del", cls=SettingsCommand)
@click.argument("key")
@json_option
@store_options
def delete(key: str, as_json: bool, **options: str | None) -> None:
    """Delete KEY, also if a process owns it. An instance is not called any more once its key is deleted.

    \b
    Example:
      dynamo-redis del app/motd
    """

    async def remove() -> bool:
        async with connect.open_registry(options, read_only=False, default_level="error") as registry:
            return await registry.delete(key)

    if not connect.run(remove()):
        raise _absent(key)
    if as_json:
        print_json([{"key": key, "deleted": True}])


@click.command("watch", cls=SettingsCommand)
@click.argument("prefix_of_keys", metavar="PREFIX")
@json_option
@_secrets_option
@store_options
def watch(prefix_of_keys: str, as_json: bool, show_secrets: bool, **options: str | None) -> None:
    """Print all keys under PREFIX, and then every change, until Ctrl-C.

    With --json each event is one JSON object on a line of its own. Its `resync` is null, or the reason why
    history was lost: then the events are the difference from the state that was printed before.

    \b
    Examples:
      dynamo-redis watch v1/instances/
      dynamo-redis watch '' --json | jq .key
    """

    async def follow() -> None:
        async with connect.open_registry(options) as registry, registry.watch(prefix_of_keys) as changes:
            async for batch in changes:
                note = f"   (resync: {batch.resync})" if batch.resync else ""
                for event in batch.events:
                    if isinstance(event, Put):
                        line = {"event": "put", **record_json(event.record, secrets=show_secrets)}
                        value = ShownValue(line["encoding"], line["value"]).compact()
                        text = f"put     {line['key']}   {value}{note}"
                    else:
                        cause, revision = str(event.cause), event.revision
                        line = {"event": "delete", "key": event.key, "cause": cause, "mod_revision": revision}
                        text = f"delete  {event.key}   ({cause}){note}"
                    if as_json:
                        print_json_line({**line, "resync": batch.resync})
                    else:
                        print_line(printable(text))

    connect.run(follow())


def _absent(key: str) -> CommandFailed:
    return CommandFailed(f"no such key: {key}")


def record_json(record: Record, *, secrets: bool) -> dict[str, Any]:
    """Return a record for programs. `encoding` is the form of `value`: `json`, `text` or `base64`."""
    shown = show_value(record.key, record.value, secrets=secrets)
    return {
        "key": record.key,
        "value": shown.value,
        "encoding": shown.encoding,
        "size_bytes": len(record.value),
        "create_revision": record.create_revision,
        "mod_revision": record.mod_revision,
        "version": record.version,
        "lease": record.lease,
    }


def _record_row(record: Record, *, secrets: bool) -> list[str]:
    value = show_value(record.key, record.value, secrets=secrets).compact()
    lease = "" if record.lease is None else format_instance_id(record.lease)
    return [record.key, human_size(len(record.value)), str(record.version), lease, value]
