"""`dynamo-redis events`: the event streams, their readers, and their events."""

from __future__ import annotations

import base64
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import click

from dynamo_redis.cli import connect
from dynamo_redis.cli.failures import CommandFailed, end_listing
from dynamo_redis.cli.formats import human_duration, human_size, human_time, printable
from dynamo_redis.cli.options import SettingsCommand, duration_value, store_options
from dynamo_redis.cli.output import (
    json_option,
    print_json,
    print_json_line,
    print_line,
    print_reasons,
    print_table,
)
from dynamo_redis.errors import InvalidRecord, StoreUnavailable
from dynamo_redis.names import format_instance_id
from dynamo_redis.store.event_base import BEGINNING, GROUP_TTL_S, Entry, StreamInfo, StreamName
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


@click.group("events")
def events() -> None:
    """Show the event streams: KV-cache events of workers, and bookings that routers share.

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
    """List all streams with their sizes, their last entries, and the lag of their slowest readers.

    \b
    Examples:
      dynamo-redis events ls
      dynamo-redis events ls --json
    """
    found, unreadable = connect.run(_read(None, options))
    if as_json:
        streams = [
            {
                "stream": _name(info.name),
                "entry_count": info.entry_count,
                "event_count": info.event_count,
                "size_bytes": info.size_bytes,
                "last_entry_id": info.last_entry_id,
                "trim_floor": info.trim_floor,
                "groups": _groups_json(info),
            }
            for info in found
        ]
        print_json([*streams, *({"error": reason} for reason in unreadable)])
    else:
        now_s = time.time()
        rows = []
        for info in found:
            last = "" if info.last_entry_id == BEGINNING else human_time(_time_s(info.last_entry_id), now_s)
            alive = [group.lag_count for group in info.groups if group.silent_s <= 3 * GROUP_TTL_S]
            counts = [str(info.entry_count), str(info.event_count), human_size(info.size_bytes)]
            slowest = str(max(alive)) if alive else ""
            rows.append([_name(info.name), *counts, last, str(len(info.groups)), slowest])
        columns = ["STREAM", "ENTRIES", "EVENTS", "SIZE", "LAST ENTRY", "GROUPS", "LAG"]
        print_table(columns, rows, empty="no event streams")
        print_reasons(unreadable)
    end_listing(len(unreadable), "event stream")


@events.command("lag", cls=SettingsCommand)
@click.argument("stream", required=False)
@json_option
@store_options
def lag(stream: str | None, as_json: bool, **options: str | None) -> None:
    """List the groups that read the streams, or STREAM. LAG is the number of entries still to be applied.

    A group is one router. A group that is silent for long is removed by the other routers.

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
    callback=duration_value,
    type=click.UNPROCESSED,
    default=0.0,
    help="Begin with the events of this age: 30s, 5m, 1h.  [default: with new events]",
)
@click.option("--count", "event_count", type=click.IntRange(min=1), help="End after this number of events.")
@json_option
@store_options
def tail(
    stream: str | None, age_s: float, event_count: int | None, as_json: bool, **options: str | None
) -> None:
    """Print the events of STREAM as they come, until Ctrl-C. STREAM is optional if there is only one.

    It reads without a group, so it does not delay trimming and takes no events from routers. With --json
    each event is one object on a line of its own. If its `event` is null, the publisher has only announced
    its next sequence number.

    \b
    Examples:
      dynamo-redis events tail
      dynamo-redis events tail dynamo/backend/kv_events --since 5m
      dynamo-redis events tail dynamo/backend/kv_events --json | jq .event
    """

    async def follow() -> None:
        shown_count = 0
        async with connect.open_events(options) as streams:
            if stream:
                name = _parse(stream)
            else:
                names = [info.name for info in await streams.list()]
                if not names:
                    raise CommandFailed("there are no event streams yet: give the STREAM to wait for")
                if len(names) > 1:
                    known = ", ".join(map(_name, names))
                    raise click.UsageError(f"there are several event streams: give one of {known}")
                name = names[0]
            source = streams.tail(name, max_age_s=age_s)
            is_away = False
            try:
                while event_count is None or shown_count < event_count:
                    try:
                        entries = await source.read(count=_READ_ENTRIES_COUNT, block_s=_BLOCK_S)
                    except StoreUnavailable as exc:
                        if not is_away:
                            log.warning("%s; waiting for it", exc)
                        is_away = True
                        continue
                    is_away = False
                    for line in (line for entry in entries for line in _event_lines(entry)):
                        if shown_count == event_count:
                            break
                        shown_count += 1
                        if as_json:
                            print_json_line(line)
                        else:
                            print_line(printable(_line_text(line)))
            finally:
                await source.aclose()

    connect.run(follow())


@events.command("rm", cls=SettingsCommand)
@click.argument("stream")
@json_option
@store_options
def rm(stream: str, as_json: bool, **options: str | None) -> None:
    """Delete a stream of a component that no longer exists. Routers that read it start again without harm.

    \b
    Example:
      dynamo-redis events rm dynamo/old-backend/kv_events
    """
    name = _parse(stream)

    async def remove() -> bool:
        async with connect.open_events(options, read_only=False) as streams:
            return await streams.delete(name)

    if not connect.run(remove()):
        raise _absent(name)
    if as_json:
        print_json([{"stream": _name(name), "removed": True}])


# --------------------------------------------------------------------------- streams


async def _read(stream: str | None, options: dict[str, str | None]) -> tuple[list[StreamInfo], list[str]]:
    """Read one stream, or all; and the reasons why some cannot be read."""
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
    name = StreamName.of_path(text if text.count("/") > 2 else f"{text}/0")
    if name is None:
        raise click.UsageError(f"{text!r} does not name a stream: write NAMESPACE/COMPONENT/TOPIC[/SHARD]")
    return name


def _name(stream: StreamName) -> str:
    """Return the name that `_parse` reads. Shard 0 is left out."""
    return stream.path.removesuffix("/0")


def _absent(stream: StreamName) -> CommandFailed:
    return CommandFailed(f"no such event stream: {_name(stream)} (`dynamo-redis events ls` lists them)")


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
    """Return the time at which an entry was appended, by the server's clock."""
    return int(entry_id.partition("-")[0]) / 1000


# --------------------------------------------------------------------------- events


def _event_lines(entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield an object for each event of an entry; one with the event None if the entry has no event.

    KV events are shown by name, other events as `_plain` shows them.
    """
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
        shown = _plain(event)
        if batch.topic == KV_EVENTS:
            with suppress(ValueError):  # an event of a later release, or no KV event
                (known,) = kv_event.read_kv_events([event])
                hashes = [f"{value:016x}" for value in known.hashes]
                shown = {"kind": _KINDS[known.kind], "tier": _TIERS[known.tier], "hashes": hashes}
        yield {**head, "sequence": sequence, "event": shown}


def _plain(value: Any) -> Any:
    """Return a msgpack value as JSON: bytes in base64, other types that JSON lacks as text."""
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


def _line_text(line: dict[str, Any]) -> str:
    """Return a line for people: time, instance, sequence number, event."""
    if "error" in line:
        return f"{line['entry_id']}  {line['error']}"
    try:
        when = time.strftime("%H:%M:%S", time.localtime(_time_s(line["entry_id"])))
    except (ValueError, OverflowError, OSError):
        when = line["entry_id"]  # outside the range of the calendar
    rank = f"/{line['dp_rank']}" if line["dp_rank"] else ""
    event = line["event"]
    if event is None:
        text = "(is its next)"
    elif not (isinstance(event, dict) and "hashes" in event):
        text = json.dumps(event, ensure_ascii=False)
    elif not (hashes := event["hashes"]):
        text = str(event["kind"])
    else:
        more = f" … {len(hashes) - _SHOWN_HASHES_COUNT} more" if len(hashes) > _SHOWN_HASHES_COUNT else ""
        text = f"{event['kind']} {event['tier']}  {' '.join(hashes[:_SHOWN_HASHES_COUNT])}{more}"
    return f"{when}  {line['instance_id']}{rank}  {line['sequence']:>8}  {text}"
