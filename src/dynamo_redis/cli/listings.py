"""`dynamo-redis instances` and `dynamo-redis models`: who serves what."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from dynamo_redis.cli import connect
from dynamo_redis.cli.formats import human_duration, human_size, show_value
from dynamo_redis.cli.options import SettingsCommand, store_options
from dynamo_redis.cli.output import json_option, print_json, print_table
from dynamo_redis.errors import DynamoRedisError
from dynamo_redis.names import INSTANCES, MODEL_CARDS, decode_segment, parse_instance_id
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.model_card import ModelCard
from dynamo_redis.store.base import Record, Snapshot


@click.command("instances", cls=SettingsCommand)
@click.argument("endpoint", required=False)
@json_option
@click.option("--show-secrets", is_flag=True, help="Show what callers must prove to know.")
@store_options
def instances(endpoint: str | None, as_json: bool, show_secrets: bool, **options: str | None) -> None:
    """List the live instances of all endpoints, of one, or of all in a namespace or component.

    ENDPOINT is one to three whole parts of a name: NAMESPACE[.COMPONENT[.ENDPOINT]].

    \b
    Examples:
      dynamo-redis instances
      dynamo-redis instances dynamo.backend.generate
      dynamo-redis instances dynamo.backend --json
    """
    snapshot = connect.run(_read(INSTANCES, options))
    records = [record for record in snapshot.records if _within(record.key, INSTANCES, endpoint)]
    if as_json:
        print_json([_instance_json(record, secrets=show_secrets) for record in records])
        return
    columns = ["INSTANCE", "ENDPOINT", "ADDRESS", "STATE", "UP"] + ["SECRET"] * show_secrets
    rows = [_instance_row(record, secrets=show_secrets) for record in records]
    print_table(columns, rows, empty=f"no instances{f' of {endpoint}' if endpoint else ''}")


@click.command("models", cls=SettingsCommand)
@json_option
@store_options
def models(as_json: bool, **options: str | None) -> None:
    """List the models that are served, with the endpoint and the number of workers behind each.

    \b
    Examples:
      dynamo-redis models
      dynamo-redis models --json
    """
    served = _by_model(connect.run(_read(MODEL_CARDS, options)))
    if as_json:
        print_json(served)
        return
    columns = ["MODEL", "TYPE", "ENDPOINT", "WORKERS", "CONTEXT", "BLOCK", "FILES"]
    print_table(columns, [_model_row(model) for model in served], empty="no models")


async def _read(prefix: str, options: dict[str, str | None]) -> Snapshot:
    async with connect.open_registry(options) as registry:
        return await registry.get_prefix(prefix)


def _within(key: str, prefix: str, endpoint: str | None) -> bool:
    """Whether a key stands under an endpoint given as `ns`, `ns.comp` or `ns.comp.ep`."""
    wanted = endpoint.removeprefix("dyn://").split(".") if endpoint else []
    return _path(key, prefix)[: len(wanted)] == wanted


def _path(key: str, prefix: str) -> list[str]:
    return [decode_segment(segment) for segment in key.removeprefix(prefix).split("/")]


def _instance_json(record: Record, *, secrets: bool) -> dict[str, Any]:
    shown = show_value(record.key, record.value, secrets=secrets).value
    return {"key": record.key, **(shown if isinstance(shown, dict) else {"value": shown})}


def _instance_row(record: Record, *, secrets: bool) -> list[str]:
    *endpoint, instance_id = _path(record.key, INSTANCES)
    try:
        instance = Instance.from_bytes(record.value)
    except (ValueError, DynamoRedisError) as exc:
        return [instance_id, ".".join(endpoint), "", f"unreadable: {exc}", ""] + [""] * secrets
    addresses = (f"{plane} {address.partition('/')[0]}" for plane, address in instance.transports.items())
    return [
        instance_id,
        str(instance.name),
        ", ".join(addresses),
        "ready" if instance.ready else "stalled",
        human_duration(time.time() - instance.started_at) if instance.started_at else "",
    ] + [instance.secret.hex() if instance.secret else ""] * secrets


def _by_model(snapshot: Snapshot) -> list[dict[str, Any]]:
    """One entry a model and endpoint, in the order of the names; unreadable cards stand under their error."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for record in snapshot.records:
        namespace, component, endpoint, instance_id, *lora = _path(record.key, MODEL_CARDS)
        name, card = _card(record.value)
        where = f"{namespace}.{component}.{endpoint}"
        entry = found.setdefault(
            (name, where), {"model": name, "endpoint": where, "instance_ids": [], "card": card}
        )
        if lora:
            entry["lora"] = "/".join(lora)
        entry["instance_ids"].append(parse_instance_id(instance_id))
    return [found[name] for name in sorted(found)]


def _card(stored: bytes) -> tuple[str, Any]:
    try:
        card = ModelCard.from_bytes(stored)
    except DynamoRedisError as exc:
        return f"unreadable: {exc}", None
    return card.display_name, json.loads(stored)


def _model_row(model: dict[str, Any]) -> list[str]:
    card = model["card"] or {}
    files = card.get("files", {}).values()
    return [
        model["model"],
        card.get("model_type", ""),
        model["endpoint"],
        str(len(model["instance_ids"])),
        str(card.get("context_length", "")),
        str(card.get("kv_cache_block_size", "")),
        human_size(sum(file["size_bytes"] for file in files)) if files else "",
    ]
