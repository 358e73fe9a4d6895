"""The measurements of suite `scale`. Rounds of a measurement are windows of one deployment, one after another,
since a start of a thousand workers takes longer than what is measured of them."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Final

import msgpack

from benchmarks.harness.processes import redis_server
from benchmarks.harness.report import Measured
from benchmarks.scale.deployment import FULL, PREFIX, Deployment, ServerCounts, Size, deployment
from benchmarks.scale.drivers.workers import ENDPOINT
from dynamo_redis.names import EndpointName
from dynamo_redis.store.keys import StreamKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.event_base import StreamName
from dynamo_redis.wire.topics import KV_EVENTS

CHATS_PER_S: Final = 2000.0
FEW_CHATS_PER_S: Final = 300.0
WINDOW_S: Final = 5.0
SETTLE_S: Final = 12.0
"""Time from a start until leases, readers and publishers are as they stay."""
LEAST_RATE: Final = 0.98
"""A window counts if this part of its chats has begun: else the machine, not Redis, was at its end."""


class TooSlow(Exception):
    """This machine cannot make the load of a row."""


def start_and_idle(rounds: int, size: Size = FULL) -> dict[str, Measured]:
    """Measure L8, L6, L2 and the connections of L3, by the product's own client."""
    read_mb, start_s, idle, lag_ms, connections = [], [], [], [], []
    with redis_server() as server, deployment(server.url, size, is_timed=True) as deployed:
        urls = [server.url]
        before = ServerCounts.read(urls)
        start_s.append(deployed.start())
        after = ServerCounts.read(urls)
        read_mb.append((after.sent_bytes - before.sent_bytes) / 1e6)
        print(f"L8: {read_mb[-1]:.1f} MB, listed after {start_s[-1]:.1f} s", flush=True)
        time.sleep(SETTLE_S)
        for number in range(rounds):
            before = ServerCounts.read(urls)
            time.sleep(WINDOW_S)
            after = ServerCounts.read(urls)
            idle.append(after.cpu_part_since(before))
            connections.append(after.clients / deployed.processes_count)
            print(f"L6 round {number + 1}: {idle[-1]:.1f} %; {connections[-1]:.2f} connections", flush=True)
    return {
        "L8": Measured([read_mb[0], start_s[0]], None, None, 1),
        "L6": Measured.alone(idle),
    }
