"""Suite `scale` on a handful of workers, and the light client against that of the product."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from benchmarks.scale import rows
from benchmarks.scale.deployment import Size
from benchmarks.scale.light_client import LightClient

from dynamo_redis.config import EventSettings
from dynamo_redis.store.event_base import NewEntry, StreamName
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer
from dynamo_redis.store.streams.redis_streams import RedisEventStreams

WITHIN_S = 60.0
SMALL = Size(workers=4, worker_processes=2, routers=2, router_processes=1)
STREAM = StreamName("dynamo", "backend", "kv_events")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WINDOW_S", "SETTLE_S", "WARM_S"):
        monkeypatch.setattr(rows, name, 1.0)
    monkeypatch.setattr(rows, "LEAST_RATE", 0.1)  # a test must pass on a busy machine, too


def test_deployments_at_rest_and_under_load_are_measured() -> None:
    found = rows.whole(1, SMALL, rate=20.0)
    assert set(found) == {"L1", "L3", "L6", "L8"}
    read_mb, listed_s = found["L8"].ours if isinstance(found["L8"].ours, list) else (0, 0)
    assert read_mb > 0
    assert listed_s > 0


def test_a_router_is_timed() -> None:
    assert rows.lag(1, SMALL, rate=20.0)["L2"].ours
    assert rows.routed(1, SMALL, rate=20.0)["L7"].ours
    assert rows.applied(1, SMALL, burst_chats=2)["L4"].ratio


async def test_light_client_sends_what_the_usual_one_sends(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path) as server:
        sent = []
        for kind in (RedisClient, LightClient):
            client = kind(server.url, timeout_s=WITHIN_S)
            streams = RedisEventStreams(client, "scale", EventSettings.load())
            await streams.append(STREAM, [NewEntry(b"first", 1)])  # opens the stream
            sent.append(await monitored(server, streams))
            await streams.aclose()
        usual, light = sent
        assert light == usual
        assert [line.split()[0] for line in usual] == [
            b'"MULTI"', b'"XADD"', b'"RPUSH"', b'"HINCRBY"', b'"HINCRBY"', b'"EXEC"', b'"PUBLISH"',
        ]  # fmt: skip


async def monitored(server: EmbeddedServer, streams: RedisEventStreams) -> list[bytes]:
    """Return the commands of two batches and a message, as MONITOR shows them."""
    reader, writer = await asyncio.open_unix_connection(server.url.removeprefix("unix://"))
    async with asyncio.timeout(WITHIN_S):
        writer.write(b"MONITOR\r\n")
        assert await reader.readline() == b"+OK\r\n"
        await streams.append(STREAM, [NewEntry(b"content", 2)])
        await streams.publish(STREAM, b"message")
        lines: list[bytes] = []
        while not lines or b"PUBLISH" not in lines[-1]:
            line = re.sub(rb"^\+\S+ \[[^]]*\] ", b"", await reader.readline()).strip()
            if not line.startswith((b'"CLIENT"', b'"PING"', b'"INFO"')):
                lines.append(line)
    writer.close()
    return lines
