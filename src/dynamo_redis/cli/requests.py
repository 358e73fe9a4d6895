"""`dynamo-redis call` and `bench`: requests to an endpoint by hand."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from dynamo_redis.cli import connect
from dynamo_redis.cli.failures import CommandFailed, print_stderr
from dynamo_redis.cli.options import Number, SettingsCommand, store_options
from dynamo_redis.cli.output import print_line, print_table
from dynamo_redis.errors import PlaneError
from dynamo_redis.names import format_instance_id, parse_instance_id
from dynamo_redis.wire.frame import payload_of

if TYPE_CHECKING:
    from dynamo_redis.runtime.client import Client

_WAIT_S = 5.0
_plane_option = click.option(
    "--plane", "request_plane", metavar="PLANE", help="The request plane, instead of DYN_REQUEST_PLANE."
)


@click.command("call", cls=SettingsCommand)
@click.argument("endpoint", metavar="ENDPOINT")
@click.argument("request", metavar="[JSON]", default="null")
@click.option("--instance", metavar="ID", help="The instance, as `instances` shows it.  [default: any]")
@_plane_option
@click.option("--timeout", "timeout_s", type=Number(min=0), metavar="S", help="Deadline of the request.")
@store_options
def call(
    endpoint: str, request: str, instance: str | None, timeout_s: float | None, **options: str | None
) -> None:
    """Send one request to NAMESPACE.COMPONENT.ENDPOINT, and print each item of the answer as it comes.

    JSON is the request; `-` reads it from the standard input. Each item is a line of JSON. The timing follows
    on the standard error. The plane's own settings come from the environment (`NATS_SERVER`, `DYN_TCP_TLS`
    and others).

    \b
    Examples:
      dynamo-redis call dynamo.backend.load_metrics
      dynamo-redis call my.hello.generate '{"name": "Ada"}'
      dynamo-redis call my.hello.generate '"Ada"' --instance 694d98147d54bfde --plane nats
    """
    value = _parse(sys.stdin.read() if request == "-" else request)
    connect.run(_call(endpoint, value, instance, timeout_s, options))


@click.command("bench", cls=SettingsCommand)
@click.argument("endpoint", metavar="ENDPOINT")
@click.argument("request", metavar="[JSON]", default="null")
@click.option("--instance", metavar="ID", help="The instance, as `instances` shows it.  [default: in turn]")
@_plane_option
@click.option(
    "-c", "--concurrency", type=click.IntRange(1, 10_000), default=16, show_default=True, metavar="N",
    help="Requests under way at once.",
)  # fmt: skip
@click.option(
    "-d", "--duration", "duration_s", type=Number(0.1, 600), default=5.0, show_default=True,
    metavar="S", help="How long requests are started.",
)  # fmt: skip
@store_options
def bench(
    endpoint: str,
    request: str,
    instance: str | None,
    concurrency: int,
    duration_s: float,
    **options: str | None,
) -> None:
    """Send the same request again and again for a short time, and print rates and percentiles.

    Every request reaches real workers: do not point it at a deployment that users need. The plane's own
    settings come from the environment (`NATS_SERVER`, `DYN_TCP_TLS` and others).

    \b
    Examples:
      dynamo-redis bench dynamo.backend.load_metrics
      dynamo-redis bench my.hello.generate '{"name": "Ada"}' -c 64 -d 10
    """
    value = _parse(request)
    connect.run(_bench(endpoint, value, instance, concurrency, duration_s, options))


def _parse(text: str) -> Any:
    try:
        value = json.loads(text)
        payload_of(value)
        return value
    except TypeError as exc:
        raise click.UsageError(f"the request cannot be sent: {exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise click.UsageError(f"the request is not JSON: {exc}; write a text as '\"text\"'") from exc


def _instance_id(text: str | None) -> int | None:
    try:
        return None if text is None else int(parse_instance_id(text))
    except ValueError as exc:
        raise click.UsageError(f"--instance: {exc}; `dynamo-redis instances` shows the ids") from exc


async def _open(endpoint: str, options: Mapping[str, Any], runtime: Any) -> Client:
    client: Client = await runtime.endpoint(endpoint).client()
    if client.wrong_plane is not None:
        raise CommandFailed(f"{client.wrong_plane}, or name the plane with --plane")
    await client.wait_for_instances(_WAIT_S)
    return client


async def _call(
    endpoint: str, value: Any, instance: str | None, timeout_s: float | None, options: Mapping[str, Any]
) -> None:
    from dynamo_redis.planes.context import Context

    wanted = _instance_id(instance)
    async with connect.open_runtime(options) as runtime:
        client = await _open(endpoint, options, runtime)
        context = None if timeout_s is None else Context(deadline=time.monotonic() + timeout_s)
        began_at = time.perf_counter()
        first_s, count = 0.0, 0
        if wanted is None:
            answer = await client.round_robin(value, annotated=False, context=context)
        else:
            answer = await client.direct(value, wanted, annotated=False, context=context)
        async for item in answer:
            first_s = first_s or time.perf_counter() - began_at
            count += 1
            print_line(json.dumps(item, ensure_ascii=False, default=repr))
        took_s = time.perf_counter() - began_at
        print_stderr(
            f"{count} item{'s' * (count != 1)} from {format_instance_id(answer.instance_id)} in "
            f"{took_s * 1000:.1f} ms, the first after {first_s * 1000:.1f} ms"
        )


async def _bench(
    endpoint: str,
    value: Any,
    instance: str | None,
    concurrency: int,
    duration_s: float,
    options: Mapping[str, Any],
) -> None:
    wanted = _instance_id(instance)
    async with connect.open_runtime(options) as runtime:
        client = await _open(endpoint, options, runtime)
        print_line(f"{concurrency} at once for {duration_s:g} s …")
        first_s: list[float] = []
        whole_s: list[float] = []
        errors: dict[str, int] = {}
        sentences: dict[str, str] = {}
        item_count = 0
        stop_at = time.perf_counter() + duration_s

        async def send_on() -> None:
            nonlocal item_count
            while (began_at := time.perf_counter()) < stop_at:
                try:
                    if wanted is None:
                        answer = await client.round_robin(value, annotated=False)
                    else:
                        answer = await client.direct(value, wanted, annotated=False)
                    came_s = 0.0
                    async for _ in answer:
                        came_s = came_s or time.perf_counter() - began_at
                        item_count += 1
                    first_s.append(came_s)
                    whole_s.append(time.perf_counter() - began_at)
                except PlaneError as exc:
                    errors[exc.code] = errors.get(exc.code, 0) + 1
                    sentences.setdefault(exc.code, str(exc))
                    await asyncio.sleep(0.01)

        began_at = time.perf_counter()
        await asyncio.gather(*(send_on() for _ in range(concurrency)))
        took_s = time.perf_counter() - began_at
    if not whole_s:
        shown = "; ".join(f"{count} × {code} ({sentences[code]})" for code, count in errors.items())
        raise CommandFailed(f"no request was answered: {shown}")
    print_line(f"{len(whole_s) / took_s:,.0f} requests/s, {item_count / took_s:,.0f} items/s")
    rows = [[name, *(_percentile(times, part) for part in (0.5, 0.9, 0.99, 1.0))]
            for name, times in (("first item", first_s), ("whole answer", whole_s))]  # fmt: skip
    print_table(["MS", "P50", "P90", "P99", "MOST"], rows, empty="")
    for code, count in errors.items():
        print_line(f"{count} requests ended with {code}, the first: {sentences[code]}")


def _percentile(times_s: list[float], part: float) -> str:
    ordered = sorted(times_s)
    return f"{ordered[min(len(ordered) - 1, int(len(ordered) * part))] * 1000:.2f}"
