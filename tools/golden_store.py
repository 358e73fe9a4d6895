"""Makes tests/vectors/store.json: the keys of a small deployment in Redis, as the last release leaves them.

    python -m tools.golden_store --write     # at a release

It has a registry with records and their change log, an object, a lock with its value, and a stream of events
and its reader. `@` stands for the prefix in the names of keys. Bytes are Latin-1 text. Keys with a TTL are
left out. A test loads it into a server and works on it with the present code.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from dynamo_redis.config import EventSettings, StoreSettings
from dynamo_redis.store.connect import open_whole_store
from dynamo_redis.store.event_base import NewEntry, StreamName
from dynamo_redis.store.keys import key_patterns
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.server import EmbeddedServer

PATH: Final = Path(__file__).parents[1] / "tests" / "vectors" / "store.json"
STREAM: Final = StreamName("dynamo", "backend", "kv_events")
CONTENT: Final = b"0123456789" * 10

Dump = dict[str, tuple[str, Any]]
"""Type and content by key."""


async def make(url: str, prefix: str) -> Dump:
    """Make a deployment, and return its keys while its process lives."""
    settings = StoreSettings.load(redis_url=url, prefix=prefix, command_timeout_s=15.0)
    registry, objects, locks, streams = open_whole_store(settings, EventSettings.load())
    client = open_client(url, timeout_s=15.0)
    try:
        await registry.start()
        await registry.put("app/gone", b"x")
        await registry.put("app/lasting", b"one")
        await registry.put("app/lasting", bytes(range(256)))
        await registry.delete("app/gone")
        await registry.register("v1/ports/h/1", b"leased")
        await objects.put("models", "m/config.json", CONTENT)
        async with locks.lock("name").hold(timeout_s=5.0) as held:
            await held.write(b"protected")
        group = streams.group(STREAM, "router")
        await group.create()
        await streams.append(STREAM, [NewEntry(b"first", 2), NewEntry(b"second", 1)])
        return await dump(client, prefix)
    finally:
        await client.aclose()
        await registry.aclose()


async def dump(client: StoreClient, prefix: str) -> Dump:
    """Return all keys of a deployment that have no TTL."""
    found: Dump = {}
    for pattern in key_patterns(prefix):
        async for key in client.scan(pattern):
            if await client.execute("PTTL", key) == -1:
                kind = (await client.execute("TYPE", key)).decode()
                content = _plain(await client.execute(*_READS[kind](key)))
                if kind == "stream":
                    groups = _plain(await client.execute("XINFO", "GROUPS", key))
                    content = {"entries": content, "groups": [group[1] for group in groups]}
                found[key.decode("latin-1").replace(f"{{{prefix}", "{@", 1)] = (kind, content)
    return dict(sorted(found.items()))


_READS: Final[dict[str, Any]] = {
    "string": lambda key: ("GET", key),
    "hash": lambda key: ("HGETALL", key),
    "zset": lambda key: ("ZRANGE", key, 0, -1, "WITHSCORES"),
    "list": lambda key: ("LRANGE", key, 0, -1),
    "stream": lambda key: ("XRANGE", key, "-", "+"),
}


async def load(client: StoreClient, prefix: str, stored: Dump) -> None:
    """Write the keys of a dump."""
    for name, (kind, content) in stored.items():
        key = name.replace("{@", f"{{{prefix}", 1).encode("latin-1")
        match kind:
            case "string":
                await client.execute("SET", key, _bytes(content))
            case "hash":
                await client.execute("HSET", key, *map(_bytes, content))
            case "zset":
                pairs = [part for i in range(0, len(content), 2) for part in (content[i + 1], content[i])]
                await client.execute("ZADD", key, *map(_bytes, pairs))
            case "list":
                await client.execute("RPUSH", key, *map(_bytes, content))
            case "stream":
                for entry_id, fields in content["entries"]:
                    await client.execute("XADD", key, entry_id, *map(_bytes, fields))
                for group in content["groups"]:
                    await client.execute("XGROUP", "CREATE", key, group, "0-0")


def golden() -> Dump:
    """Return the deployment of the last release."""
    stored = json.loads(PATH.read_text("utf-8"))["keys"]
    return {key: (kind, content) for key, (kind, content) in stored.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _bytes(text: Any) -> bytes:
    return str(text).encode("latin-1")


async def _make_golden() -> Dump:
    with TemporaryDirectory() as directory:
        async with EmbeddedServer(Path(directory)) as server:
            return await make(server.url, "golden")


def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="tools.golden_store", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", required=True, help="write the file as of now")
    parser.parse_args()
    origin = "Written by the first release, with tools.golden_store."
    PATH.write_text(
        json.dumps({"origin": origin, "keys": asyncio.run(_make_golden())}, indent=1) + "\n", "utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
