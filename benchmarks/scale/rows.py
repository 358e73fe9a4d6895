"""The measurements of suite `scale`.

The rounds of a measurement are windows of one deployment, one after another: to start a thousand workers
takes longer than what is measured of them.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgpack

from benchmarks.harness.processes import Driver, redis_server
from benchmarks.harness.report import Measured, median
from benchmarks.scale.deployment import FULL, PREFIX, Deployment, ServerCounts, Size, deployment
from benchmarks.scale.drivers.workers import ENDPOINT
from dynamo_redis.names import EndpointName
from dynamo_redis.store.cluster_server import EmbeddedCluster
from dynamo_redis.store.event_base import StreamName
from dynamo_redis.store.keys import StreamKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.wire.topics import KV_EVENTS

CHATS_PER_S: Final = 2000.0
FEW_CHATS_PER_S: Final = 300.0
ROUTED_PER_S: Final = 300.0
BURST_CHATS: Final = 15
WINDOW_S: Final = 5.0
SETTLE_S: Final = 12.0
"""Time from a start until leases, readers and publishers are as they stay."""
WARM_S: Final = 5.0
"""Time until as many answers end as begin."""
LEAST_RATE: Final = 0.97
"""A window counts if this part of its chats has begun: else this machine was at its end, and not Redis."""
APPLIED_S: Final = 60.0
UNDER_WAY_S: Final = 2.0
"""Time in which the last events of a window come."""
SAMPLE_ENTRIES: Final = 4000


class TooSlow(Exception):
    """This machine cannot make the load of a row."""


def windows(rounds: int, urls: Sequence[str]) -> list[tuple[ServerCounts, ServerCounts]]:
    """Let some windows pass, and return what servers said before and after each."""
    looks = [ServerCounts.read(urls)]
    for _ in range(rounds):
        time.sleep(WINDOW_S)
        looks.append(ServerCounts.read(urls))
    return list(itertools.pairwise(looks))


def per_s(rate: float, deployed: Deployment, passed_s: float, before: Sequence[dict[str, Any]]) -> float:
    """Return the events a second of the workers since earlier counts. Raises TooSlow if they fell behind."""
    now = deployed.worker_counts()
    chats, events = (
        sum(one[name] for one in now) - sum(one[name] for one in before) for name in ("chats", "events")
    )
    if chats < LEAST_RATE * rate * passed_s:
        raise TooSlow(f"{chats / passed_s:.0f} of {rate:.0f} chats a second could be made")
    return float(events) / passed_s


# --------------------------------------------------------------------------- one Redis


def whole(rounds: int, size: Size = FULL, rate: float = CHATS_PER_S) -> dict[str, Measured]:
    """Measure L8, L6, L3 and L1.

    This machine cannot run a thousand workers of the product and their chats at once. So two deployments are
    measured, and L1 and the memory of L3 are their sums: workers of the product without chats, and bare
    publishers with the chats. Routers count twice in them.
    """
    idle, connections = [], []
    with redis_server() as server, deployment(server.url, size, kind="usual") as deployed:
        urls = [server.url]
        before = ServerCounts.read(urls)
        listed_s = deployed.start()
        after = ServerCounts.read(urls)
        read_mb = (after.sent_bytes - before.sent_bytes) / 1e6
        print(f"L8: {read_mb:.1f} MB read, all listed after {listed_s:.1f} s", flush=True)
        time.sleep(SETTLE_S)
        for number, (one, other) in enumerate(windows(rounds, urls)):
            idle.append(other.cpu_part_since(one))
            connections.append(other.clients / deployed.processes_count)
            commands = (other.commands - one.commands) / (other.at - one.at)
            print(
                f"L6 round {number + 1}: {idle[-1]:.1f} % of a core, {commands:.0f} commands/s, "
                f"{connections[-1]:.2f} connections a process",
                flush=True,
            )
        idle_memory_mb = ServerCounts.read(urls).memory_bytes / 1e6
    busy, memory_mb = [], []
    with redis_server() as server, deployment(server.url, size, kind="bare") as deployed:
        urls = [server.url]
        deployed.start()
        counts, began = deployed.worker_counts(), time.monotonic()
        deployed.run_chats(rate)
        for number, (one, other) in enumerate(windows(rounds, urls)):
            busy.append(other.cpu_part_since(one))
            memory_mb.append(other.memory_bytes / 1e6 + idle_memory_mb)
            print(
                f"L1 round {number + 1}: {busy[-1]:.1f} % of a core for chats, "
                f"{(other.sent_bytes - one.sent_bytes) / (other.at - one.at) / 1e6:.1f} MB/s out, "
                f"{(other.commands - one.commands) / (other.at - one.at):.0f} commands/s, "
                f"{memory_mb[-1]:.0f} MB with those of the workers at rest",
                flush=True,
            )
        events_per_s = per_s(rate, deployed, time.monotonic() - began, counts)
        print(f"L1: {events_per_s:.0f} events/s", flush=True)
    return {
        "L8": Measured([median([read_mb]), median([listed_s])], None, None, 1),
        "L6": Measured.alone(idle),
        "L1": Measured.alone([part + statistics.median(idle) for part in busy]),
        "L3": Measured.alone(memory_mb, connections),
    }


@contextmanager
def _one_router(size: Size) -> Iterator[tuple[Deployment, Driver, str]]:
    """Run a router of the product, timed, beside a deaf one; yield its driver, and the server's URL."""
    beside = Size(size.workers, size.worker_processes, 1, 1)
    with redis_server() as server, deployment(server.url, beside, kind="light", is_timed=True) as deployed:
        assert deployed.timed is not None
        deployed.start()
        time.sleep(SETTLE_S)
        yield deployed, deployed.timed, server.url


def lag(rounds: int, size: Size = FULL, rate: float = FEW_CHATS_PER_S) -> dict[str, Measured]:
    """Measure L2."""
    lags_ms = []
    with _one_router(size) as (deployed, timed, _):
        deployed.tell_workers(f"chats {rate / size.worker_processes}")
        time.sleep(WARM_S)
        for number in range(rounds):
            deployed.tell_workers("timed")
            deployed.tell("timed", timed)
            time.sleep(WINDOW_S)
            lags_ms.append(_lag_ms(deployed))
            print(f"L2 round {number + 1}: p99 {lags_ms[-1]:.1f} ms", flush=True)
    return {"L2": Measured.alone(lags_ms)}


def routed(rounds: int, size: Size = FULL, rate: float = ROUTED_PER_S) -> dict[str, Measured]:
    """Measure L7: the router chooses for all chats of the workers."""
    chats = []
    with _one_router(size) as (deployed, timed, _):
        deployed.tell_workers(f"chats {rate / size.worker_processes}")
        deployed.tell(f"chats {rate}", timed)
        time.sleep(WARM_S)
        for number in range(rounds):
            before, workers, began = deployed.timed_counts(), deployed.worker_counts(), time.monotonic()
            time.sleep(WINDOW_S)
            after = deployed.timed_counts()
            per_s(rate, deployed, time.monotonic() - began, workers)
            chats.append(float(after["chats"] - before["chats"]) / float(after["cpu_s"] - before["cpu_s"]))
            p50_us, p99_us = after["choice_us"]
            print(
                f"L7 round {number + 1}: {chats[-1]:.0f} chats a second of CPU; "
                f"a choice takes {p50_us:.0f} µs, p99 {p99_us:.0f}",
                flush=True,
            )
    return {"L7": Measured.alone(chats)}


def applied(rounds: int, size: Size = FULL, burst_chats: int = BURST_CHATS) -> dict[str, Measured]:
    """Measure L4."""
    parts = []
    with _one_router(size) as (deployed, _, url):
        for number in range(rounds):
            parts.append(_applied(deployed, url, burst_chats))
            ours, rival = parts[-1]
            print(f"L4 round {number + 1}: {ours:.0f} blocks/s, msgpack {rival:.0f}", flush=True)
    return {"L4": Measured.against(*map(list, zip(*parts, strict=True)))}


def _applied(deployed: Deployment, url: str, burst_chats: int) -> tuple[float, float]:
    """Return the blocks that the timed router applies in a second of its CPU time, and those that msgpack
    decodes."""
    before = deployed.timed_counts()
    sent = sum(one["events"] for one in deployed.worker_counts())
    deployed.tell_workers(f"burst {burst_chats}")
    wanted = before["events"] + sum(one["events"] for one in deployed.worker_counts()) - sent
    until = time.monotonic() + APPLIED_S
    while (after := deployed.timed_counts())["events"] < wanted:
        if time.monotonic() > until:
            raise TooSlow("the router has not applied a burst of events")
        time.sleep(0.2)
    blocks_an_event, decoded_per_s = asyncio.run(_decoded(url))
    events = after["events"] - before["events"]
    return events * blocks_an_event / (after["cpu_s"] - before["cpu_s"]), decoded_per_s


async def _decoded(url: str) -> tuple[float, float]:
    """Return the blocks of an event of the stream, and how many msgpack decodes in a second of CPU time."""
    endpoint = EndpointName.parse(ENDPOINT)
    keys = StreamKeys(PREFIX, StreamName(endpoint.namespace, endpoint.component, KV_EVENTS))
    client = RedisClient(url, timeout_s=10.0)
    try:
        found = await client.execute("XREVRANGE", keys.events, "+", "-", "COUNT", SAMPLE_ENTRIES)
    finally:
        await client.aclose()
    contents = [fields[1] for _, fields in found]
    began = time.process_time()
    batches = [msgpack.unpackb(content) for content in contents]
    took_s = time.process_time() - began
    events = [event for batch in batches for event in batch[7]]
    blocks = sum(len(hashes) // 8 for _, _, hashes in events)
    return blocks / len(events), blocks / took_s


def _lag_ms(deployed: Deployment) -> float:
    """Return the 99th percentile of the times from publication to application of the last window."""
    published: dict[str, int] = {}
    for one in deployed.worker_counts():
        published.update(one["published"])
    time.sleep(UNDER_WAY_S)
    seen: dict[str, int] = deployed.timed_counts()["seen"]
    took_ms = sorted((seen[block] - at) / 1e6 for block, at in published.items() if block in seen)
    if len(took_ms) < LEAST_RATE * len(published):
        raise TooSlow(f"{len(took_ms)} of {len(published)} blocks have come")
    return took_ms[len(took_ms) * 99 // 100]


# --------------------------------------------------------------------------- several masters

SHARDED: Final = Size(workers=200, worker_processes=2, routers=4, router_processes=1)
SHARDED_PER_S: Final = 400.0
MASTERS: Final = 3


def shards(rounds: int, size: Size = SHARDED, rate: float = SHARDED_PER_S) -> dict[str, Measured]:
    """Measure L5: a cluster of three masters, with the events in one stream and in three, in turn."""
    one_ms, three_ms = [], []
    with tempfile.TemporaryDirectory() as directory:
        cluster = EmbeddedCluster(Path(directory), masters_count=MASTERS, replicas_count=0)
        asyncio.run(cluster.start())
        try:
            urls = [f"redis://127.0.0.1:{node.port}" for node in cluster.nodes]
            for number in range(rounds):
                one_ms.append(_cpu_ms(cluster.url, urls, size, rate, 1))
                three_ms.append(_cpu_ms(cluster.url, urls, size, rate, MASTERS))
                print(
                    f"L5 round {number + 1}: {one_ms[-1]:.1f} ms of CPU for 1,000 events on one master, "
                    f"{three_ms[-1]:.1f} ms on three",
                    flush=True,
                )
        finally:
            asyncio.run(cluster.stop())
    return {"L5": Measured.against(three_ms, one_ms, costs=True)}


def _cpu_ms(url: str, urls: Sequence[str], size: Size, rate: float, shards_count: int) -> float:
    """Return the CPU time of all masters for 1,000 events, in ms, beyond that of the deployment at rest."""
    with deployment(url, size, kind="bare", shards=shards_count) as deployed:
        deployed.start()
        time.sleep(WARM_S)
        ((rest, still),) = windows(1, urls)
        deployed.run_chats(rate)
        time.sleep(WARM_S)
        counts = deployed.worker_counts()
        ((before, after),) = windows(1, urls)
        events_per_s = per_s(rate, deployed, after.at - before.at, counts)
    percent = after.cpu_part_since(before) - still.cpu_part_since(rest)
    return 1e3 * percent / 100 / events_per_s * 1e3
