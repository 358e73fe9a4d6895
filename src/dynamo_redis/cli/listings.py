"""`dynamo-redis instances` and `dynamo-redis models`: the live processes and the served models."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from dynamo_redis.cli import connect
from dynamo_redis.cli.failures import end_listing
from dynamo_redis.cli.formats import human_duration, human_size, show_value
from dynamo_redis.cli.options import SettingsCommand, store_options
from dynamo_redis.cli.output import json_option, print_json, print_reasons, print_table
from dynamo_redis.decoding import removal
from dynamo_redis.errors import InvalidRecord
from dynamo_redis.frontend.record import FrontendRecord
from dynamo_redis.models.card import ModelCard, parse_card_key
from dynamo_redis.names import FRONTENDS, INSTANCES, MODEL_CARDS, decode_segment, format_instance_id
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.store.base import Record, Snapshot


@click.command("instances", cls=SettingsCommand)
@click.argument("endpoint", required=False)
@json_option
@click.option("--show-secrets", is_flag=True, help="Show the secrets of instances.")
@store_options
def instances(endpoint: str | None, as_json: bool, show_secrets: bool, **options: str | None) -> None:
    """List the live processes, and the endpoints that each serves. Without ENDPOINT it lists frontends, too.

    ENDPOINT is one to three whole parts of a name: NAMESPACE[.COMPONENT[.ENDPOINT]]. With --json each
    endpoint of a process is an object of its own.

    \b
    Examples:
      dynamo-redis instances
      dynamo-redis instances dynamo.backend.generate
      dynamo-redis instances dynamo.backend --json
    """

    async def read() -> tuple[Snapshot, Snapshot]:
        async with connect.open_registry(options) as registry:
            return await registry.get_prefix(INSTANCES), await registry.get_prefix(FRONTENDS)

    workers, frontends = connect.run(read())
    found = [_decode(rec, Instance) for rec in workers.records if _is_within(rec.key, INSTANCES, endpoint)]
    found += [_Found(exc.key, exc) for exc in workers.invalid if _is_within(exc.key, INSTANCES, endpoint)]
    if not endpoint:
        found += [_decode(record, FrontendRecord) for record in frontends.records]
        found += [_Found(exc.key, exc) for exc in frontends.invalid]
    unreadable = [entry for entry in found if isinstance(entry.instance, InvalidRecord)]
    if as_json:
        records = []
        for entry in found:
            record: Any = {}
            if entry.value is not None:
                record = show_value(entry.key, entry.value, secrets=show_secrets).value
            fields = record if isinstance(record, dict) else {"value": record}
            error = {"error": str(entry.instance)} if isinstance(entry.instance, InvalidRecord) else {}
            records.append({"key": entry.key, **fields, **error})
        print_json(records)
    else:
        columns = ["INSTANCE", "SERVES", "ADDRESS", "STATE", "UP"] + ["SECRET"] * show_secrets
        rows = _process_rows(found, secrets=show_secrets)
        for entry in unreadable:
            prefix = FRONTENDS if entry.key.startswith(FRONTENDS) else INSTANCES
            *name, instance_id = _path(entry.key, prefix)
            rows.append([instance_id, ".".join(name), "", "unreadable", ""] + [""] * show_secrets)
        print_table(columns, rows, empty=f"no instances{f' of {endpoint}' if endpoint else ''}")
        print_reasons(str(entry.instance) for entry in unreadable)
    end_listing(len(unreadable), "instance record")


@click.command("models", cls=SettingsCommand)
@json_option
@store_options
def models(as_json: bool, **options: str | None) -> None:
    """List the served models, with their endpoints and numbers of workers.

    If the cards of a model's workers differ, as in a rolling update, each version of the card has a row.

    \b
    Examples:
      dynamo-redis models
      dynamo-redis models --json
    """

    async def read() -> Snapshot:
        async with connect.open_registry(options) as registry:
            return await registry.get_prefix(MODEL_CARDS)

    served = _group_by_model(connect.run(read()))
    if as_json:
        print_json(served)
    else:
        columns = ["MODEL", "TYPE", "ENDPOINT", "WORKERS", "CONTEXT", "BLOCK", "FILES", "CARD"]
        rows = []
        for model in served:
            if "error" in model:
                rows.append(["unreadable", *[""] * 7])
                continue
            card, files = model["card"], model["card"]["files"].values()
            size = human_size(sum(file["size_bytes"] for file in files)) if files else ""
            counts = (len(model["instance_ids"]), card["context_length"], card["kv_cache_block_size"])
            names = [model["model"], card["model_type"], model["endpoint"]]
            rows.append([*names, *map(str, counts), size, model["fingerprint"][:8]])
        print_table(columns, rows, empty="no models")
        print_reasons(model["error"] for model in served if "error" in model)
        versions = Counter(model["model"] for model in served if "error" not in model)
        for name, count in versions.items():
            if count > 1:
                click.echo(
                    f"model {name} has workers in {count} groups that differ in endpoint or card: frontends "
                    "share its requests out among all that can take them",
                    err=True,
                )
    end_listing(sum("error" in model for model in served), "model card")


def _is_within(key: str, prefix: str, endpoint: str | None) -> bool:
    """Return whether a key is under an endpoint given as `ns`, `ns.comp` or `ns.comp.ep`."""
    wanted = endpoint.removeprefix("dyn://").split(".") if endpoint else []
    return _path(key, prefix)[: len(wanted)] == wanted


def _path(key: str, prefix: str) -> list[str]:
    return [decode_segment(segment) for segment in key.removeprefix(prefix).split("/")]


@dataclass(frozen=True, slots=True)
class _Found:
    """The instance or frontend at a key, or the error if it cannot be read; and the value, if it was read."""

    key: str
    instance: Instance | FrontendRecord | InvalidRecord
    value: bytes | None = field(default=None, repr=False)  # holds the instance's secret


def _decode(record: Record, kind: type[Instance | FrontendRecord]) -> _Found:
    try:
        return _Found(record.key, kind.from_record(record), record.value)
    except InvalidRecord as exc:
        return _Found(record.key, exc, record.value)


def _process_rows(found: Sequence[_Found], *, secrets: bool) -> list[list[str]]:
    """Return a row for each process, in the order in which they were found."""
    processes: dict[int, list[Instance | FrontendRecord]] = {}
    for entry in found:
        if not isinstance(entry.instance, InvalidRecord):
            processes.setdefault(entry.instance.instance_id, []).append(entry.instance)
    rows = []
    for instance_id, parts in processes.items():
        serves, addresses, secret = [], [], ""
        # The frontend of a process stands before its endpoints.
        for part in sorted(parts, key=lambda part: isinstance(part, Instance)):
            if isinstance(part, FrontendRecord):
                serves.append(f"OpenAI API ({part.router_mode})")
                addresses.append(part.http_url)
                continue
            serves.append(str(part.name))
            addresses += (f"{plane} {address}" for plane, address in part.addresses.items())
            secret = part.secret.hex() if part.secret else secret
        started_at = min((part.started_at for part in parts if part.started_at), default=0.0)
        is_ready = all(part.ready for part in parts if isinstance(part, Instance))
        rows.append(
            [
                format_instance_id(instance_id),
                " + ".join(serves),
                ", ".join(dict.fromkeys(addresses)),
                "ready" if is_ready else "stalled",
                human_duration(time.time() - started_at) if started_at else "",
            ]
            + [secret] * secrets
        )
    return rows


def _group_by_model(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Return an object for each model, endpoint and version of the card, in the order of the names; then one
    for each card that cannot be read."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    unreadable = [{"key": exc.key, "error": str(exc)} for exc in snapshot.invalid]
    for record in snapshot.records:
        try:
            endpoint, instance_id = parse_card_key(record.key)
            card = ModelCard.from_bytes(record.value)
        except InvalidRecord as exc:
            unreadable.append({"key": record.key, "error": str(exc.at(record.key, removal(record.key)))})
            continue
        name, where = card.display_name, str(endpoint)
        entry = found.setdefault(
            (name, where, card.fingerprint),
            {
                "model": name,
                "endpoint": where,
                "fingerprint": card.fingerprint,
                "instance_ids": [],
                "card": card.model_dump(mode="json"),
            },
        )
        lora = record.key.removeprefix(f"{MODEL_CARDS}{endpoint.path}/").partition("/")[2]
        if lora:
            entry["lora"] = decode_segment(lora)
        entry["instance_ids"].append(instance_id)
    return [found[name] for name in sorted(found)] + unreadable
