"""`dynamo-redis stats`, `ping` and `token`: what the instances say of themselves, and a token to ask them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from dynamo_redis.cli import connect
from dynamo_redis.cli.failures import CommandFailed
from dynamo_redis.cli.options import Number, SettingsCommand, load, store_options
from dynamo_redis.cli.output import json_option, print_json, print_json_line, print_line, print_table
from dynamo_redis.config import PlaneSettings, StoreSettings
from dynamo_redis.errors import ConfigError, InvalidRecord, PlaneError
from dynamo_redis.names import INSTANCES, EndpointName, format_instance_id
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.http.token import TOKEN_S, make_token
from dynamo_redis.planes.select import make_client
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.service import SCRAPE_S, Question, ask_all

_WATCH_S = 2.0
_MAX_TOKEN_S = 10 * 365 * 86_400.0
_NS = 1_000_000_000
_endpoint_argument = click.argument("endpoint", required=False)
_timeout_option = click.option(
    "--timeout", "timeout_s", type=Number(min=0), default=SCRAPE_S, show_default=True, metavar="S",
    help="Longest wait for the answers.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Asked:
    """An instance, its plane, and what it answered."""

    instance_id: int
    plane: str
    took_s: float
    answer: dict[str, Any] | PlaneError


@click.command("stats", cls=SettingsCommand)
@_endpoint_argument
@click.option(
    "--watch", is_flag=True,
    help="Ask again every 2 s, until Ctrl-C. With --json each round is a list on one line.",
)  # fmt: skip
@json_option
@_timeout_option
@store_options
def stats(endpoint: str | None, watch: bool, as_json: bool, timeout_s: float, **options: str | None) -> None:
    """Ask all instances at once how many requests each endpoint has had, and how long they took.

    ENDPOINT is NAMESPACE.COMPONENT.ENDPOINT. Instances are asked on the plane that each serves; the planes'
    own settings come from the environment (`NATS_SERVER`, `DYN_TCP_TLS` and others). MEAN is over all
    requests since the endpoint began; P50 and P99 are over its last 1,000. With --json each answer has the
    form of a NATS service (ADR-32): times in nanoseconds, and `data` of the endpoint's own stats handler.

    \b
    Examples:
      dynamo-redis stats
      dynamo-redis stats dynamo.backend.generate --watch
      dynamo-redis stats --json
    """
    name = None if endpoint is None else EndpointName.parse(endpoint)
    while True:
        asked = connect.run(_ask(options, "stats", name, timeout_s))
        if watch and not as_json:
            click.clear()
        if as_json:
            (print_json_line if watch else print_json)([_as_json(one) for one in asked])
        else:
            _print_stats(asked)
        if not watch:
            break
        time.sleep(_WATCH_S)
    _fail_for_silent(asked)


@click.command("ping", cls=SettingsCommand)
@_endpoint_argument
@json_option
@_timeout_option
@store_options
def ping(endpoint: str | None, as_json: bool, timeout_s: float, **options: str | None) -> None:
    """Ask all instances for a sign of life, through the same connections and checks as requests.

    TOOK is the time of each instance's own answer, with the connection to it. The planes' own settings come
    from the environment (`NATS_SERVER`, `DYN_TCP_TLS` and others).

    \b
    Examples:
      dynamo-redis ping
      dynamo-redis ping dynamo.backend.generate
    """
    name = None if endpoint is None else EndpointName.parse(endpoint)
    asked = connect.run(_ask(options, "ping", name, timeout_s))
    if as_json:
        print_json([_as_json(one) for one in asked])
    else:
        rows = [
            [
                format_instance_id(one.instance_id),
                one.plane,
                f"{one.took_s * 1000:.1f} ms" if isinstance(one.answer, dict) else "",
                str(one.answer if isinstance(one.answer, PlaneError) else one.answer.get("version", "")),
            ]
            for one in asked
        ]
        print_table(["INSTANCE", "PLANE", "TOOK", "VERSION"], rows, empty="no instances")
    _fail_for_silent(asked)


@click.command("token", cls=SettingsCommand)
@click.argument("instance", metavar="INSTANCE")
@click.option(
    "--lifetime", "lifetime_s", type=Number(1, _MAX_TOKEN_S), default=TOKEN_S, show_default=True, metavar="S",
    help="Seconds until the token expires.",
)  # fmt: skip
@store_options
def token(instance: str, lifetime_s: float, **options: str | None) -> None:
    """Print a bearer token for one INSTANCE of the http plane (its id as `instances` shows it).

    \b
    Example:
      curl --http2-prior-knowledge -H "Authorization: Bearer $(dynamo-redis token INSTANCE)" \\
        http://HOST:8888/v1/rpc/dynamo/backend/generate -d '{"prompt": "Hello"}'
    """
    found = [
        record
        for record in connect.run(_instances(options))
        if instance in (format_instance_id(record.instance_id), str(record.instance_id))
    ]
    if not found:
        raise CommandFailed(f"no instance {instance}: `dynamo-redis instances` lists them")
    secret = found[0].secret
    if secret is None:
        raise CommandFailed(f"instance {instance} takes requests without a token (DYN_PLANE_AUTH=off)")
    click.echo(make_token(secret, found[0].instance_id, time.time() + lifetime_s))


async def _instances(options: Mapping[str, Any]) -> list[Instance]:
    async with connect.open_registry(options) as registry:
        snapshot = await registry.get_prefix(INSTANCES)
    found: list[Instance] = []
    for record in snapshot.records:
        try:
            found.append(Instance.from_record(record))
        except InvalidRecord as exc:
            print_line(f"left out: {exc}")
    return found


async def _ask(
    options: Mapping[str, Any], question: Question, name: EndpointName | None, timeout_s: float
) -> list[_Asked]:
    """Ask each process, on its other planes too if the first one gives no answer. Raises CommandFailed if a
    named endpoint has no instance."""
    instances = [one for one in await _instances(options) if name is None or one.name == name]
    if name is not None and not instances:
        raise CommandFailed(f"no instance of {name}: `dynamo-redis instances` lists them")
    unasked = {instance.instance_id: (instance, instance.planes.split(", ")) for instance in instances}
    answers: dict[int, _Asked] = {}
    while unasked:
        by_plane: dict[str, list[Target]] = defaultdict(list)
        for instance, planes in unasked.values():
            target = instance.target(planes[0])
            if target is not None:
                by_plane[planes.pop(0)].append(target)
        asking = (
            _ask_on(plane, targets, options, question, name, timeout_s) for plane, targets in by_plane.items()
        )
        asked = await asyncio.gather(*asking)
        answers |= {one.instance_id: one for some in asked for one in some}
        unasked = {
            instance_id: (instance, planes)
            for instance_id, (instance, planes) in unasked.items()
            if planes and isinstance(answers[instance_id].answer, PlaneError)
        }
    return sorted(answers.values(), key=lambda one: one.instance_id)


async def _ask_on(
    plane: str,
    targets: Sequence[Target],
    options: Mapping[str, Any],
    question: Question,
    name: EndpointName | None,
    timeout_s: float,
) -> list[_Asked]:
    """Ask processes on one plane."""
    store = load(StoreSettings, dict(options))
    try:
        client = make_client(PlaneSettings.load(request_plane=plane), store=store)
    except ConfigError as exc:
        return [_Asked(target.instance_id, plane, 0.0, PlaneError(str(exc))) for target in targets]
    endpoint = None if name is None else str(name)
    try:
        answers = await ask_all(client, targets, question, endpoint=endpoint, timeout_s=timeout_s)
    finally:
        await client.aclose()
    return [
        _Asked(instance_id, plane, answer.took_s, answer.found) for instance_id, answer in answers.items()
    ]


def _as_json(one: _Asked) -> dict[str, Any]:
    if isinstance(one.answer, PlaneError):
        return {"id": format_instance_id(one.instance_id), "plane": one.plane, "error": str(one.answer)}
    return one.answer


def _print_stats(asked: Sequence[_Asked]) -> None:
    columns = ["INSTANCE", "PLANE", "ENDPOINT", "REQUESTS", "ERRORS", "IN FLIGHT", "MEAN", "P50", "P99"]
    rows: list[list[str]] = []
    for one in asked:
        instance = format_instance_id(one.instance_id)
        if isinstance(one.answer, PlaneError):
            rows.append([instance, one.plane, f"no answer: {one.answer}", *[""] * 6])
            continue
        for endpoint in one.answer.get("endpoints", []):
            counts = (endpoint.get(name, 0) for name in ("num_requests", "num_errors", "in_flight"))
            times = (
                _duration(endpoint.get(f"{name}_processing_time", 0)) for name in ("average", "p50", "p99")
            )
            rows.append([instance, one.plane, endpoint["name"], *map(str, counts), *times])
    print_table(columns, rows, empty="no instances")


def _duration(nanoseconds: int) -> str:
    seconds = nanoseconds / _NS
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _fail_for_silent(asked: Sequence[_Asked]) -> None:
    silent = sum(isinstance(one.answer, PlaneError) for one in asked)
    if silent:
        raise CommandFailed(f"{silent} of {len(asked)} instances gave no answer")
