"""`dynamo-redis router-state`: how each router is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from dynamo_redis.cli import connect
from dynamo_redis.cli.failures import end_listing
from dynamo_redis.cli.formats import human_duration
from dynamo_redis.cli.options import SettingsCommand, store_options
from dynamo_redis.cli.output import json_option, print_json, print_reasons, print_table
from dynamo_redis.names import format_instance_id, parse_instance_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_redis.frontend.record import FrontendRecord
    from dynamo_redis.router.asking import Answer

_COLUMNS = [
    "ROUTER",
    "PROCESS",
    "CHOOSES AMONG",
    "KNOWS BY",
    "WORKERS",
    "BLOCKS",
    "CURSOR",
    "LAG",
    "SNAPSHOT",
    "RECOVERED",
    "ACTIVE",
    "WAITING",
    "HIT RATE",
]


@click.command("router-state", cls=SettingsCommand)
@json_option
@store_options
def router_state(as_json: bool, **options: str | None) -> None:
    """Ask each router, in a frontend or a service of its own, how it is; and list the frontends without one.

    Its workers, and the blocks that it knows them to hold; how far it has read the stream of KV events
    (cursor), and how much is still unread (lag); how old the last snapshot is; how often a worker had to tell
    it what it had missed (recovered); its requests under way, and those that wait because all workers are
    busy; and which part of the prompts' tokens the workers had in their caches (hit rate).

    \b
    Examples:
      dynamo-redis router-state
      dynamo-redis router-state --json
    """
    answers, frontends = connect.run(_ask(options))
    routing = {answer.state["instance_id"] for answer in answers if answer.state is not None}
    plain = [frontend for frontend in frontends if frontend.instance_id not in routing]
    urls = {frontend.instance_id: frontend.http_url for frontend in frontends}
    if as_json:
        print_json([*map(_json, answers), *(frontend.model_dump(mode="json") for frontend in plain)])
    else:
        empty = "no routers: start a frontend with --router-mode kv, or `dynamo-redis router`"
        rows = [_row(answer, urls) for answer in answers] + [_plain_row(frontend) for frontend in plain]
        print_table(_COLUMNS, rows, empty=empty)
        print_reasons(answer.failure or "" for answer in answers if not answer.is_readable)
    end_listing(sum(not answer.is_readable for answer in answers), "router")


async def _ask(options: dict[str, str | None]) -> tuple[list[Answer], list[FrontendRecord]]:
    from dynamo_redis.frontend.record import list_frontends
    from dynamo_redis.router.asking import ask_states

    async with connect.open_runtime(options) as runtime:
        frontends, _ = await list_frontends(runtime.registry)
        return await ask_states(runtime), frontends


def _json(answer: Answer) -> dict[str, Any]:
    if answer.state is not None:
        return answer.state
    return {"key": answer.key, "instance_id": _instance_id(answer.key), "error": answer.failure}


def _instance_id(key: str) -> int | None:
    try:
        return parse_instance_id(key.rpartition("/")[2])
    except ValueError:
        return None


def _plain_row(frontend: FrontendRecord) -> list[str]:
    """A frontend that has no router of its own."""
    chosen_by = frontend.router_endpoint or frontend.router_mode
    process = f"{format_instance_id(frontend.instance_id)} {frontend.http_url}"
    return ["-", process, f"chosen by {chosen_by}", *["-"] * (len(_COLUMNS) - 3)]


def _row(answer: Answer, urls: Mapping[int, str]) -> list[str]:
    state = answer.state
    if state is None:
        problem = f"does not answer: {answer.failure}" if answer.is_readable else "unreadable"
        instance_id = answer.key.rpartition("/")[2]
        return ["", instance_id, problem, *[""] * (len(_COLUMNS) - 3)]
    instance_id = state["instance_id"]
    index, hit_rate = state["index"], state["hit_rate"]
    return [
        state["router_id"],
        " ".join((format_instance_id(instance_id), *([urls[instance_id]] if instance_id in urls else []))),
        state["endpoint"],
        _knows_by(state, index),
        str(len(state["workers"])),
        str(index["block_count"]),
        index.get("position") or "-",
        _lag(index),
        _snapshot(index),
        str(index.get("recovered_count", "-")),
        str(state["active_count"]),
        str(state["waiting_count"]),
        "-" if hit_rate is None else f"{hit_rate:.1%}",
    ]


def _knows_by(state: dict[str, Any], index: dict[str, Any]) -> str:
    if state["mode"] == "predicted":
        return "prediction"
    if index["caught_up"]:
        return f"events ({index['mode']})"
    if index["connected"]:
        return f"events ({index['mode']}, catching up)"
    return f"events ({index['mode']}, unreadable for {human_duration(index['disconnected_s'])})"


def _lag(index: dict[str, Any]) -> str:
    count = index.get("lag_count")
    if count is None:
        return "-"
    return f"{count} entries, {human_duration(index['lag_s'] or 0.0)}" if count else "0"


def _snapshot(index: dict[str, Any]) -> str:
    snapshot = index.get("snapshot")
    return f"{human_duration(max(time.time() - snapshot['at'], 0))} ago" if snapshot else "-"
