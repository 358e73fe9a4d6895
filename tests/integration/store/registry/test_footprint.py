"""The registry's keys in Redis, and its commands."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer


async def test_redis_holds_the_keys_of_the_schema_page_and_no_others(
    own_redis_server: EmbeddedServer, open_registry: Any, dynamo_redis_prefix: str, repository: Path
) -> None:
    page = (repository / "docs" / "redis-schema.md").read_text("utf-8")
    registry_part = page.split("\n## Registry\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\{prefix\}[^`]*)` \| (\w+) \| ([^|]+) \|", registry_part, flags=re.MULTILINE)
    registry = await open_registry(own_redis_server.url)
    await registry.register("i/1", b"v")
    await registry.put("free", b"v")
    client = RedisClient(own_redis_server.url, timeout_s=1.0)
    found = {}
    async for key in client.scan("*"):
        name = key.decode().replace(f"{registry.lease_id:x}", "<lease>")
        name = name.replace(f"{{{dynamo_redis_prefix}}}", "{prefix}")
        kind, ttl_ms = await client.pipeline([("TYPE", key), ("PTTL", key)])
        found[name] = (kind.decode(), ttl_ms > 0)
    await client.aclose()
    assert found == {name: (kind, ttl.strip() != "none") for name, kind, ttl in rows}


async def _calls(client: RedisClient) -> dict[str, int]:
    stats = (await client.execute("INFO", "commandstats")).decode()
    return {name: int(calls) for name, calls in re.findall(r"cmdstat_(\w+):calls=(\d+)", stats)}


async def test_a_settled_deployment_asks_little(
    own_redis_server: EmbeddedServer, open_registry: Any, mirror: Any
) -> None:
    processes = [await open_registry(own_redis_server.url, ttl_s=10) for _ in range(3)]
    for n, process in enumerate(processes):
        await process.register(f"i/{n}", b"v")
        await mirror(process, "i/")
    client = RedisClient(own_redis_server.url, timeout_s=1.0)
    await asyncio.sleep(0.5)
    before, began_at = await _calls(client), time.monotonic()
    await asyncio.sleep(4.0)
    after, elapsed_s = await _calls(client), time.monotonic() - began_at
    await client.aclose()
    asked = {name: after[name] - before.get(name, 0) for name in ("evalsha", "xread")}
    rate = sum(asked.values()) / elapsed_s / len(processes)
    assert 1.0 < rate < 4.0, asked
    assert after.get("psubscribe", 0) == before.get("psubscribe", 0)
    assert after.get("eval", 0) == before.get("eval", 0), "scripts go by their hash"


async def test_registration_with_grant_is_one_round_trip(
    dynamo_redis_url: str, open_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = await open_registry(dynamo_redis_url)
    calls: list[str] = []
    script, execute = registry._kv.client.script, registry._kv.client.execute

    async def counted_script(script_: Any, *rest: Any) -> Any:
        if script_.name != "registry_tick":
            calls.append(script_.name)
        return await script(script_, *rest)

    async def counted_execute(*command: Any) -> Any:
        calls.append(str(command[0]))
        return await execute(*command)

    await asyncio.sleep(0.1)  # the work at the start is done
    monkeypatch.setattr(registry._kv.client, "script", counted_script)
    monkeypatch.setattr(registry._kv.client, "execute", counted_execute)
    await registry.register("i/1", b"v", exclusive=True)
    assert calls == ["registry_write"]
    await registry.register("i/2", b"v")
    assert calls == ["registry_write"] * 2
