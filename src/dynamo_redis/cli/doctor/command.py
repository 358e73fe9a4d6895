"""`dynamo-redis doctor`: the command."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import click

from dynamo_redis.cli import connect
from dynamo_redis.cli.failures import FAILED
from dynamo_redis.cli.options import SettingsCommand, load, setting_options, store_options
from dynamo_redis.cli.output import json_option
from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import StoreError

UNREACHABLE: Final = 2
"""The exit code if the server cannot be reached."""

_count = click.IntRange(0, 1_000_000)


@click.command("doctor", cls=SettingsCommand)
@click.argument("url", required=False)
@click.option("--workers", type=_count, default=0, metavar="N", help="Workers that shall use this Redis.")
@click.option("--frontends", type=_count, default=0, metavar="N", help="Frontend processes.")
@click.option("--routers", type=_count, default=0, metavar="N", help="Router services.")
@json_option
@setting_options(StoreSettings, "command_timeout_s")
@store_options
def doctor(
    url: str | None, workers: int, frontends: int, routers: int, as_json: bool, **options: str | None
) -> int:
    """Check the Redis at URL: what it is, what it allows, what it can lose, how fast it is.

    One line a check, with the remedy below it. Without URL it takes the server of --redis-url, DYN_REDIS_URL,
    or a running `up`. It works for every user and on managed services: a check says `?` where the server does
    not show what it needs. It writes one key under the prefix and removes it; nothing else changes, and it may
    run beside a deployment.

    \b
    pass  as it should be
    warn  works, and can lose, slow down or expose something
    FAIL  processes cannot work with it, or soon not any more
    ?     not visible to this user

    Exit code: 0 if no check fails, 1 if one fails, 2 if the server cannot be reached.

    \b
    Examples:
      dynamo-redis doctor redis://10.0.0.5:6379
      dynamo-redis doctor --workers 200 --frontends 4 --routers 2
      dynamo-redis doctor rediss://user:password@cache.example.com:6379 --json | jq '.[] | select(.level == "fail")'
    """  # noqa: E501
    from dynamo_redis.cli.doctor.report import print_findings, print_findings_json

    if url is not None and options.get("redis_url") is not None:
        raise click.UsageError("give either URL or --redis-url")
    need = {"workers": workers, "frontends": frontends, "routers": routers}
    connect.start_silent_command(options)
    findings, reached = connect.run(_examine(options | ({"redis_url": url} if url else {}), need))
    (print_findings_json if as_json else print_findings)(findings)
    if not reached:
        return UNREACHABLE
    return FAILED if any(finding.level == "fail" for finding in findings) else 0


async def _examine(options: Mapping[str, Any], need: dict[str, int]) -> tuple[list[Any], bool]:
    """Return the findings, and whether the server could be reached."""
    with _without("opentelemetry"):
        from dynamo_redis.cli.doctor.checks import CHECKS
        from dynamo_redis.cli.doctor.examination import examine
    from dynamo_redis.cli.doctor.finding import Finding

    settings = load(StoreSettings, options)
    url = settings.require_url()
    try:
        seen = await examine(
            url, settings.prefix, timeout_s=settings.command_timeout_s, need=need, login=settings.login()
        )
    except StoreError as exc:
        return [Finding("connection", "fail", str(exc))], False
    reached = Finding("connection", "pass", f"{seen.address}, as user {seen.user}")
    return [reached, *(check(seen) for check in CHECKS)], True


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Let a package look as if it was not installed: redis-py loads OpenTelemetry's SDK where it is, for
    metrics of its own that this process does not use. That takes a tenth of this command's time."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
