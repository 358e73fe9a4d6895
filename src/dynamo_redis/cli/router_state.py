"""`dynamo-redis router-state`: the state of each router."""

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
    from dynamo_redis.router.asking import RouterAnswer

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
    """Print the state of each router, in a frontend or a router service; and the frontends without a router.

    WORKERS and BLOCKS: its workers, and the blocks that they hold by its index. CURSOR and LAG: its position
    in the stream of KV events, and the unread rest. SNAPSHOT: the age of the last snapshot. RECOVERED: the
    number of times that a worker had to repeat missed events. ACTIVE: requests under way. WAITING: requests
    that wait because all workers are busy. HIT RATE: the fraction of prompt tokens that the workers had in
    their caches.

    \b
    Examples:
      dynamo-redis router-state
      dynamo-redis router-state --json
    """

    async def ask() -> tuple[list[RouterAnswer], list[FrontendRecord]]:
        from dynamo_redis.frontend.record import list_frontends
        from dynamo_redis.router.asking import ask_states

        async with connect.open_runtime(options) as runtime:
            frontends, _ = await list_frontends(runtime.registry)
            return await ask_states(runtime), frontends

    answers, frontends = connect.run(ask())
    routing = {answer.state["instance_id"] for answer in answers if answer.state is not None}
    plain = [frontend for frontend in frontends if frontend.instance_id not in routing]
    urls = {frontend.instance_id: frontend.http_url for frontend in frontends}
    if as_json:
        print_json([*map(_state_json, answers), *(frontend.model_dump(mode="json") for frontend in plain)])
    else:
        empty = "no routers: start a frontend with --router-mode kv, or `dynamo-redis router`"
        rows = [_router_row(answer, urls) for answer in answers]
        for frontend in plain:
            chosen_by = frontend.router_endpoint or frontend.router_mode
            process = f"{format_instance_id(frontend.instance_id)} {frontend.http_url}"
            rows.append(["-", process, f"chosen by {chosen_by}", *["-"] * (len(_COLUMNS) - 3)])
        print_table(_COLUMNS, rows, empty=empty)
        print_reasons(answer.failure or "" for answer in answers if not answer.is_readable)
    end_listing(sum(not answer.is_readable for answer in answers), "router")


def _state_json(answer: RouterAnswer) -> dict[str, Any]:
    if answer.state is not None:
        return answer.state
    try:
        instance_id = parse_instance_id(answer.key.rpartition("/")[2])
    except ValueError:
        instance_id = None
    return {"key": answer.key, "instance_id": instance_id, "error": answer.failure}


def _router_row(answer: RouterAnswer, urls: Mapping[int, str]) -> list[str]:
    state = answer.state
    if state is None:
        problem = f"does not answer: {answer.failure}" if answer.is_readable else "unreadable"
        instance_id = answer.key.rpartition("/")[2]
        return ["", instance_id, problem, *[""] * (len(_COLUMNS) - 3)]
    instance_id = state["instance_id"]
    index, hit_rate = state["index"], state["hit_rate"]
    lag_count, snapshot = index.get("lag_count"), index.get("snapshot")
    lag = "-"
    if lag_count is not None:
        lag = f"{lag_count} entries, {human_duration(index['lag_s'] or 0.0)}" if lag_count else "0"
    if state["mode"] == "predicted":
        knows_by = "prediction"
    elif state["mode"] == "load":
        knows_by = "load alone"
    elif index["caught_up"]:
        knows_by = f"events ({index['mode']})"
    elif index["connected"]:
        knows_by = f"events ({index['mode']}, catching up)"
    else:
        knows_by = f"events ({index['mode']}, unreadable for {human_duration(index['disconnected_s'])})"
    return [
        state["router_id"],
        " ".join((format_instance_id(instance_id), *([urls[instance_id]] if instance_id in urls else []))),
        state["endpoint"],
        knows_by,
        str(len(state["workers"])),
        str(index["block_count"]),
        index.get("position") or "-",
        lag,
        f"{human_duration(max(time.time() - snapshot['at'], 0))} ago" if snapshot else "-",
        str(index.get("recovered_count", "-")),
        str(state["active_count"]),
        str(state["waiting_count"]),
        "-" if hit_rate is None else f"{hit_rate:.1%}",
    ]
