"""`dynamo-redis gc`: finds and removes what no process of the deployment needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import click

from dynamo_redis.cli import connect
from dynamo_redis.cli.failures import end_listing, print_stderr
from dynamo_redis.cli.formats import human_size, printable
from dynamo_redis.cli.options import SettingsCommand, duration_value, load, store_options
from dynamo_redis.cli.output import json_option, print_json, print_line, print_reasons, print_table
from dynamo_redis.config import StoreSettings
from dynamo_redis.models.upload import MODEL_BUCKET
from dynamo_redis.router.index.snapshotter import SNAPSHOT_BUCKET
from dynamo_redis.store.garbage.collector import LEAST_GRACE_S, Buckets, Collector
from dynamo_redis.store.garbage.in_use import InUse
from dynamo_redis.store.garbage.survey import REASONS, Finding, Kind, Survey
from dynamo_redis.store.redis.opening import open_client

_DAY_S = 86_400.0
_SETTLE_S = 15.0
_NAMES_COUNT = 100


@click.command("gc", cls=SettingsCommand)
@click.option(
    "--apply", "is_applied", is_flag=True, help="Remove what is found. Without it nothing is written."
)
@click.option(
    "--grace",
    "grace_s",
    metavar="DURATION",
    callback=duration_value,
    type=click.UNPROCESSED,
    default=_DAY_S,
    help="Keep what was put, appended, held or read within this time; at least 10m.  [default: 24h]",
)
@click.option(
    "--settle",
    "settle_s",
    metavar="DURATION",
    callback=duration_value,
    type=click.UNPROCESSED,
    default=_SETTLE_S,
    help="With --apply: read the registry twice, with this time between, so that processes which just lost "
    "their leases are back.  [default: 15s]",
)
@json_option
@store_options
def gc(is_applied: bool, grace_s: float, settle_s: float, as_json: bool, **options: str | None) -> None:
    """Show what no process needs any more: files of models that no worker serves, snapshots and event streams
    of components that have left, chunks of broken uploads, temporary keys without an expiry, old locks.

    It shows what it would remove, and writes nothing, unless --apply is given. It can run beside the
    deployment: each removal checks again on the server. It never touches records of the registry, plain keys,
    objects of other buckets than the deployment's own, and keys that it does not know. It counts those.
    Chunks stay for another 10 minutes, for readers under way.

    Exit code 0: done; 1: something could not be read, and was not judged.

    \b
    Examples:
      dynamo-redis gc
      dynamo-redis gc --apply
      dynamo-redis gc --grace 7d --json | jq '.[] | {kind, count}'
    """
    if grace_s < LEAST_GRACE_S:
        raise click.BadParameter("it is at least 10m: workers may be starting", param_hint="--grace")
    survey, removed = connect.run(_collect(options, grace_s, settle_s if is_applied else None))
    if as_json:
        print_json(_rows_json(survey, removed))
    else:
        _print(survey, removed)
    end_listing(len(survey.unreadable), "key or record")


async def _collect(
    options: Mapping[str, Any], grace_s: float, settle_s: float | None
) -> tuple[Survey, dict[Kind, int] | None]:
    """Survey, and remove if `settle_s` is given. Return what was found, and how much of each kind went."""
    in_use = await _read_registry(options)
    async with _open_collector(options, grace_s) as collector:
        if settle_s is None:
            return await collector.survey(in_use), None
        await asyncio.sleep(settle_s)
        survey = await collector.survey(in_use | await _read_registry(options))
        removed = dict.fromkeys(Kind, 0)
        for finding in survey.findings:
            removed[finding.kind] += await collector.remove(finding)
    return survey, removed


@asynccontextmanager
async def _open_collector(options: Mapping[str, Any], grace_s: float) -> AsyncIterator[Collector]:
    settings = load(StoreSettings, options)
    client = open_client(
        settings.require_url(),
        timeout_s=settings.command_timeout_s,
        client_name="dynamo-redis-gc",
        login=settings.login(),
    )
    try:
        yield Collector(client, settings.prefix, Buckets(MODEL_BUCKET, SNAPSHOT_BUCKET), grace_s=grace_s)
    finally:
        await client.aclose()


async def _read_registry(options: Mapping[str, Any]) -> InUse:
    async with connect.open_registry(options) as registry:
        return InUse.of_snapshot(await registry.get_prefix(""))


# --------------------------------------------------------------------------- output


def _count(findings: list[Finding]) -> int:
    return sum(finding.count for finding in findings)


def _rows_json(survey: Survey, removed: dict[Kind, int] | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "kind": kind.value,
            "reason": REASONS[kind],
            "count": _count(found := survey.of_kind(kind)),
            "size_bytes": sum(finding.size_bytes for finding in found),
            "names": [finding.name for finding in found[:_NAMES_COUNT]],
            "removed_count": None if removed is None else removed[kind],
        }
        for kind in Kind
    ]
    rows.append({"kind": "unknown keys", "count": survey.unknown_count, "names": survey.unknown})
    rows.append({"kind": "other objects", "count": survey.other_objects_count})
    return [*rows, *({"error": reason} for reason in survey.unreadable)]


def _print(survey: Survey, removed: dict[Kind, int] | None) -> None:
    rows = []
    for kind in Kind:
        if found := survey.of_kind(kind):
            size = human_size(sum(finding.size_bytes for finding in found))
            gone = [] if removed is None else [str(removed[kind])]
            rows.append([kind.value, str(_count(found)), *gone, size, found[0].name, REASONS[kind]])
    columns = ["KIND", "COUNT", *([] if removed is None else ["REMOVED"]), "SIZE", "FIRST", "WHY"]
    print_table(columns, rows, empty="nothing to remove")
    if survey.unknown_count:
        print_line(f"{survey.unknown_count} unknown keys, left alone:")
        for key in survey.unknown:
            print_line(f"  {printable(key)}")
    if rows and removed is None:
        print_stderr("nothing was removed: --apply removes it", prefix="")
    print_reasons(survey.unreadable)
