"""`dynamo-redis events`: the event streams, who reads them, and what passes through."""

from __future__ import annotations

import base64
import json
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import click

from dynamo_redis.cli import connect
from dynamo_redis.cli.failures import CommandFailed, end_listing
from dynamo_redis.cli.formats import human_duration, human_size, human_time, printable
from dynamo_redis.cli.options import SettingsCommand, store_options
from dynamo_redis.cli.output import (
    json_option,
    print_json,
    print_json_line,
    print_line,
    print_reasons,
    print_table,
)
from dynamo_redis.config import parse_duration
from dynamo_redis.errors import InvalidRecord, StoreUnavailable
from dynamo_redis.names import decode_segment, format_instance_id
from dynamo_redis.store.event_base import BEGINNING, GROUP_TTL_S, Entry, EventStreams, StreamInfo, StreamName
from dynamo_redis.wire import kv_event
from dynamo_redis.wire.event import EventBatch
from dynamo_redis.wire.topics import KV_EVENTS

log = logging.getLogger(__name__)

_READ_ENTRIES_COUNT = 64
_BLOCK_S = 2.0
_KINDS = {
    kv_event.STORED: "stored",
    kv_event.REMOVED: "removed",
    kv_event.REMOVED_INSIDE: "removed inside",
    kv_event.CLEARED: "cleared",
}
_TIERS = {kv_event.DEVICE: "device", kv_event.HOST: "host", kv_event.DISK: "disk"}
_SHOWN_HASHES_COUNT = 4


def _seconds(ctx: click.Context, param: click.Parameter, value: object) -> object:
    try:
        return parse_duration(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc


@click.group("events")
def events() -> None:
    """Look into the event streams: KV-cache events of workers, and what routers tell each other.

    A stream is named NAMESPACE/COMPONENT/TOPIC[/SHARD], as `dynamo-redis events ls` prints it.

    \b
    Examples:
      dynamo-redis events ls
      dynamo-redis events lag
      dynamo-redis events tail dynamo/backend/kv_events
    """


@events.command("ls", cls=SettingsCommand)
@json_option
@store_options
def ls(as_json: bool, **options: str | None) -> None:
    """List all streams: what each holds, its last entry, and how far behind its slowest reader is.

    \b
    Examples:
      dynamo-redis events ls
      dynamo-redis events ls --json
    """
    found, unreadable = connect.run(_read(None, options))
    if as_json:
        print_json([*map(_stream_json, found), *({"error": reason} for reason in unreadable)])
    else:
        now_s = time.time()
        columns = ["STREAM", "ENTRIES", "EVENTS", "SIZE", "LAST ENTRY", "GROUPS", "LAG"]
        print_table(columns, [_stream_row(info, now_s) for info in found], empty="no event streams")
        print_reasons(unreadable)
    end_listing(len(unreadable), "event stream")


@events.command("lag", cls=SettingsCommand)
@click.argument("stream", required=False)
@json_option
@store_options
def lag(stream: str | None, as_json: bool, **options: str | None) -> None:
    """List the groups that read the streams, or STREAM: how many entries each has still to apply.

    A group is one router. One that is silent for long is removed by the others.

    \b
    Examples:
      dynamo-redis events lag
      dynamo-redis events lag dynamo/backend/kv_events --json
    """
    found, unreadable = connect.run(_read(stream, options))
    groups = [{"stream": _name(info.name), **group} for info in found for group in _groups_json(info)]
    rows = [
        [
            *(group["stream"], group["group"], group["position"]),
            *(str(group["lag_count"]), human_duration(group["silent_s"])),
        ]
        for group in groups
    ]
    if as_json:
        print_json([*groups, *({"error": reason} for reason in unreadable)])
    else:
        columns = ["STREAM", "GROUP", "POSITION", "LAG", "SILENT"]
        print_table(columns, rows, empty="no router reads event streams")
        print_reasons(unreadable)
    end_listing(len(unreadable), "event stream")


@events.command("tail", cls=SettingsCommand)
@click.argument("stream", required=False)
@click.option(
    "--since",
    "age_s",
    metavar="DURATION",
    callback=_seconds,
    type=click.UNPROCESSED,
    default=0.0,
    help="Begin with what is so old: 30s, 5m, 1h.  [default: with what comes now]",
)
@click.option("--count", "event_count", type=click.IntRange(min=1), help="End after so many events.")
@json_option
@store_options
def tail(
    stream: str | None, age_s: float, event_count: int | None, as_json: bool, **options: str | None
) -> None:
    """Print the events of STREAM as they come, until Ctrl-C. STREAM may be left out if there is only one.

    It reads along without a group, so it neither holds up trimming nor takes anything from a router. With
    --json each event is one object on a line of its own; an `event` of null is a publisher that says only
    which sequence is its next.

    \b
    Examples:
      dynamo-redis events tail
      dynamo-redis events tail dynamo/backend/kv_events --since 5m
      dynamo-redis events tail dynamo/backend/kv_events --json | jq .event
    """
    connect.run(_follow(stream, age_s, event_count, as_json, options))


@events.command("rm", cls=SettingsCommand)
@click.argument("stream")
@json_option
@store_options
def rm(stream: str, as_json: bool, **options: str | None) -> None:
    """Delete a stream, of a component that is no more. Routers that read it begin anew; nothing breaks.

    \b
    Example:
      dynamo-redis events rm dynamo/old-backend/kv_events
    """
    name = _parse(stream)

    async def remove() -> bool:
        async with connect.open_events(options) as streams:
            return await streams.delete(name)

    if not connect.run(remove()):
        raise _absent(name)
    if as_json:
        print_json([{"stream": _name(name), "removed": True}])


# --------------------------------------------------------------------------- streams


async def _read(stream: str | None, options: dict[str, str | None]) -> tuple[list[StreamInfo], list[str]]:
    """One stream or all, and why others cannot be read."""
    name = None if stream is None else _parse(stream)
    unreadable: list[str] = []
    async with connect.open_events(options) as streams:
        if name is None:
            return await streams.list(on_left_out=unreadable.append), unreadable
        info = await streams.info(name)
    if info is None:
        raise _absent(name)
    return [info], unreadable


def _parse(text: str) -> StreamName:
    parts = text.split("/")
    if not (3 <= len(parts) <= 4 and all(parts) and (len(parts) == 3 or parts[3].isdecimal())):
        raise click.UsageError(f"{text!r} does not name a stream: write NAMESPACE/COMPONENT/TOPIC[/SHARD]")
    namespace, component, topic = map(decode_segment, parts[:3])
    return StreamName(namespace, component, topic, int(parts[3]) if len(parts) == 4 else 0)


def _name(stream: StreamName) -> str:
    """As `_parse` reads it: shard 0 is not told."""
    return stream.path.removesuffix("/0")


def _absent(stream: StreamName) -> CommandFailed:
    return CommandFailed(f"no such event stream: {_name(stream)} (`dynamo-redis events ls` lists them)")


def _stream_row(info: StreamInfo, now_s: float) -> list[str]:
    last = "" if info.last_entry_id == BEGINNING else human_time(_time_s(info.last_entry_id), now_s)
    alive = (group.lag_count for group in info.groups if group.silent_s <= 3 * GROUP_TTL_S)
    slowest = max(alive, default=None)
    return [
        _name(info.name),
        str(info.entry_count),
        str(info.event_count),
        human_size(info.size_bytes),
        last,
        str(len(info.groups)),
        "" if slowest is None else str(slowest),
    ]


def _stream_json(info: StreamInfo) -> dict[str, Any]:
    return {
        "stream": _name(info.name),
        "entry_count": info.entry_count,
        "event_count": info.event_count,
        "size_bytes": info.size_bytes,
        "last_entry_id": info.last_entry_id,
        "trim_floor": info.trim_floor,
        "groups": _groups_json(info),
    }


def _groups_json(info: StreamInfo) -> list[dict[str, Any]]:
    return [
        {
            "group": group.name,
            "position": group.position,
            "lag_count": group.lag_count,
            "silent_s": group.silent_s,
        }
        for group in info.groups
    ]


def _time_s(entry_id: str) -> float:
    """When an entry was appended, by the server's clock."""
    return int(entry_id.partition("-")[0]) / 1000


# --------------------------------------------------------------------------- events


async def _follow(
    stream: str | None, age_s: float, limit_count: int | None, as_json: bool, options: dict[str, str | None]
) -> None:
    shown_count = 0
    async with connect.open_events(options) as streams:
        name = _parse(stream) if stream else await _only_stream(streams)
        source = streams.tail(name, max_age_s=age_s)
        away = False
        try:
            while limit_count is None or shown_count < limit_count:
                try:
                    entries = await source.read(count=_READ_ENTRIES_COUNT, block_s=_BLOCK_S)
                except StoreUnavailable as exc:
                    if not away:
                        log.warning("%s; waiting for it", exc)
                    away = True
                    continue
                away = False
                for line in (line for entry in entries for line in _lines(entry)):
                    if shown_count == limit_count:
                        break
                    shown_count += 1
                    if as_json:
                        print_json_line(line)
                    else:
                        print_line(printable(_text(line)))
        finally:
            await source.aclose()


async def _only_stream(streams: EventStreams) -> StreamName:
    names = [info.name for info in await streams.list()]
    if len(names) == 1:
        return names[0]
    if not names:
        raise CommandFailed("there are no event streams yet: name the one to wait for")
    raise click.UsageError(f"which one of {', '.join(map(_name, names))}?")


def _lines(entry: Entry) -> Iterator[dict[str, Any]]:
    """One for each event of an entry; one whose event is None if it has none."""
    head: dict[str, Any] = {"entry_id": entry.entry_id}
    try:
        batch = EventBatch.from_bytes(entry.content)
    except InvalidRecord as exc:
        yield {**head, "error": f"unreadable: {exc}"}
        return
    head |= {
        "topic": batch.topic,
        "instance_id": format_instance_id(batch.publisher.instance_id),
        "epoch": batch.publisher.epoch,
        "dp_rank": batch.publisher.dp_rank,
        "published_at_ms": batch.published_at_ms,
    }
    if not batch.events:
        yield {**head, "sequence": batch.next_sequence, "event": None}
    for sequence, event in enumerate(batch.events, batch.first_sequence):
        yield {**head, "sequence": sequence, "event": _shown(batch.topic, event)}


def _shown(topic: str, event: Any) -> Any:
    """An event as JSON has it: KV events by name, bytes in base64."""
    if topic == KV_EVENTS:
        try:
            (known,) = kv_event.read_kv_events([event])
        except ValueError:
            pass  # of a later release, or none
        else:
            hashes = [f"{value:016x}" for value in known.hashes]
            return {"kind": _KINDS[known.kind], "tier": _TIERS[known.tier], "hashes": hashes}
    return _plain(event)


def _plain(value: Any) -> Any:
    """A value of msgpack as JSON can have it: bytes in base64, and as text what JSON has no word for."""
    match value:
        case dict():
            return {str(_plain(key)): _plain(part) for key, part in value.items()}
        case list():
            return [_plain(part) for part in value]
        case bytes():
            return f"base64:{base64.b64encode(value).decode()}"
        case float() if not math.isfinite(value):
            return str(value)
        case str() | int() | float() | None:
            return value
        case _:
            return str(value)


def _text(line: dict[str, Any]) -> str:
    """A line for people: when, who, its number, and what."""
    if "error" in line:
        return f"{line['entry_id']}  {line['error']}"
    try:
        when = time.strftime("%H:%M:%S", time.localtime(_time_s(line["entry_id"])))
    except (ValueError, OverflowError, OSError):
        when = line["entry_id"]  # beyond the calendar
    rank = f"/{line['dp_rank']}" if line["dp_rank"] else ""
    return f"{when}  {line['instance_id']}{rank}  {line['sequence']:>8}  {_what(line['event'])}"


def _what(event: Any) -> str:
    if event is None:
        return "(is its next)"
    if not (isinstance(event, dict) and "hashes" in event):
        return json.dumps(event, ensure_ascii=False)
    hashes = event["hashes"]
    if not hashes:
        return str(event["kind"])
    more = f" … {len(hashes) - _SHOWN_HASHES_COUNT} more" if len(hashes) > _SHOWN_HASHES_COUNT else ""
    return f"{event['kind']} {event['tier']}  {' '.join(hashes[:_SHOWN_HASHES_COUNT])}{more}"
