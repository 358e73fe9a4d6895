"""The answers of the Sentinels of a URL to the question whether they can agree on a failover."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from dynamo_redis.store.redis.server_errors import FAILURES, one_line, prepare, reply
from dynamo_redis.store.redis.url import Address, ServerUrl, make_connection, parse_server_url, show_address


@dataclass(frozen=True, slots=True)
class SentinelView:
    """A sentinel's answer. `error`: it did not answer. `doubt`: its reason why there can be no failover."""

    address: str
    error: str = ""
    doubt: str = ""


async def sentinel_views(url: str, timeout_s: float) -> list[SentinelView]:
    """Ask each sentinel of a URL; empty if it names none. Raises ConfigError."""
    parsed = parse_server_url(url)
    return list(await asyncio.gather(*(_ask(parsed, each, timeout_s) for each in parsed.sentinels)))


async def _ask(url: ServerUrl, sentinel: Address, timeout_s: float) -> SentinelView:
    async def log_in(connection: Any) -> None:
        prepare(connection)
        await connection.on_connect()

    options = url.sentinel_options(sentinel) | {"protocol": 2, "redis_connect_func": log_in}
    connection = make_connection(options)
    shown = show_address(sentinel)
    try:
        async with asyncio.timeout(timeout_s):
            await connection.connect()
            await connection.send_command("SENTINEL", "CKQUORUM", url.master_name)
            await connection.read_response()
    except FAILURES as exc:
        said = reply(exc)
        if said is not None and said.startswith("NOQUORUM"):
            return SentinelView(shown, doubt=said)
        return SentinelView(shown, error=said or one_line(exc))
    finally:
        await connection.disconnect(nowait=True)
    return SentinelView(shown)
