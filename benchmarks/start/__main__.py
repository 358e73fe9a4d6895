"""Suite `start`: the time until a deployment runs, and its cost for Redis.

S1  a cold `dynamo-redis up` until the first streamed token
S2  the runtime API, echo of 128 bytes, 64 at a time over 4 worker processes, against Dynamo's own runtime
S3  `start_serving` until another runtime's client lists the instance, against PING on the same server
S4  CPU time of Redis a chat with kv routing, against a SET and a GET (`redis_load`)
S5  the same with round robin
S6  chats that fail of 1,000 while Redis is replaced, full, and without its replica (`refusals`)
S7  longest silence of `/live` under hostile clients and tenants (`silence`)
S8  time of each script and command in a large store, against a small one (`walks`)

`--rows S1,S2` runs some.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import httpx

from benchmarks.harness.chats import chat_body, first_model
from benchmarks.harness.processes import DYNAMO, dynamo_side, our_side, redis_server, up
from benchmarks.harness.report import Measured
from benchmarks.harness.suite import Bounds, Groups, run_suite
from benchmarks.start.redis_load import redis_cost
from benchmarks.start.refusals import refusals
from benchmarks.start.silence import silences
from benchmarks.start.walks import walks
from dynamo_redis.runtime import Client, DistributedRuntime, Settings
from dynamo_redis.store.redis.client import RedisClient

CONCURRENCY = 64
REQUESTS = 3200
"""Requests in a round of the rival; our round has eight times as many."""


def start_round() -> float:
    """Return the seconds from the start of the command to the first streamed token."""
    started = time.perf_counter()
    with up("--speedup-ratio", "0") as url:
        body = chat_body(first_model(url, 30), "Hello!", stream=True)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=10) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:") and '"content":"' in line and '"content":""' not in line:
                    return time.perf_counter() - started
    raise RuntimeError("the answer held no token")


def throughput(redis_url: str, rounds: int) -> tuple[list[float], list[float]]:
    """Return the requests/s of each round: ours, and the rival's, in turn."""
    ours: list[float] = []
    rivals: list[float] = []
    with our_side(redis_url) as mine, dynamo_side() as rival:
        for side in (mine, rival):
            side.round(640, CONCURRENCY)
        for number in range(rounds):
            ours.append(mine.round(8 * REQUESTS, CONCURRENCY)["per_s"])
            rivals.append(rival.round(REQUESTS, CONCURRENCY)["per_s"])
            print(f"S2 round {number + 1}: {ours[-1]:.0f} against {rivals[-1]:.0f} requests/s", flush=True)
    return ours, rivals


async def discovery_round(
    worker: DistributedRuntime, client: Client, ping: RedisClient, repeats: int
) -> tuple[list[float], list[float]]:
    """Return the seconds from serving to being listed, and those of a PING before each."""
    listed: list[float] = []
    pings: list[float] = []
    endpoint = worker.endpoint("bench.discovery.generate")
    for _ in range(repeats):
        started = time.perf_counter()
        await ping.execute("PING")
        pings.append(time.perf_counter() - started)
        started = time.perf_counter()
        serving = asyncio.create_task(endpoint.start_serving(_nothing))
        await client.wait_for_instances(5)
        listed.append(time.perf_counter() - started)
        await (await serving).unregister()
        while client.instance_ids():
            await asyncio.sleep(0.001)
    return listed, pings


async def _nothing(request: Any) -> Any:
    return request


async def discovery(redis_url: str, rounds: int) -> tuple[list[float], list[float]]:
    """Return the medians of each round, in ms."""
    settings = Settings.load(redis_url=redis_url, prefix="bench-discovery")
    listed: list[float] = []
    pings: list[float] = []
    ping = RedisClient(redis_url, timeout_s=3, client_name="bench")
    async with (
        DistributedRuntime(settings=settings) as worker,
        DistributedRuntime(settings=settings) as caller,
    ):
        client = await caller.endpoint("bench.discovery.generate").client()
        await ping.connect()
        await discovery_round(worker, client, ping, 10)
        for number in range(rounds):
            one, other = await discovery_round(worker, client, ping, 50)
            listed.append(1e3 * statistics.median(one))
            pings.append(1e3 * statistics.median(other))
            print(f"S3 round {number + 1}: {listed[-1]:.3f} ms against PING {pings[-1]:.3f} ms", flush=True)
        await ping.aclose()
    return listed, pings


def cold_starts(rounds: int) -> dict[str, Measured]:
    """Measure S1, in s."""
    starts = []
    for number in range(rounds):
        starts.append(start_round())
        print(f"S1 round {number + 1}: {starts[-1]:.2f} s", flush=True)
    return {"S1": Measured.alone(starts)}


def echoes(rounds: int) -> dict[str, Measured]:
    """Measure S2, in requests/s."""
    with redis_server() as server:
        return {"S2": Measured.against(*throughput(server.url, rounds))}


def discoveries(rounds: int) -> dict[str, Measured]:
    """Measure S3, in ms."""
    with redis_server() as server:
        return {"S3": Measured.against(*asyncio.run(discovery(server.url, rounds)))}


BOUNDS: Bounds = {
    "S1": ("`dynamo-redis up` (installed) → first token, s", 4, 2),
    "S2": ("runtime API, unary c=64 over 4 instances ÷ Dynamo 1.6.1 tcp", 5, 15),
    "S3": ("serve → in a client's list, p50, ÷ PING round trip in the same run", 25, 8),
    "S4": (
        (
            "CPU of Redis a chat: kv routing with events, 2 workers, 300 chats/s of 100-word prompts ÷ one "
            "SET + GET sent alone, in the same run"
        ),
        1.0,
        0.4,
    ),
    "S5": ("the same with round robin and no router ÷ one SET + GET", 0.2, 0.05),
    "S6": (
        (
            "chats failed of 1,000 while Redis fails over behind one address, is full, loses its replica, "
            "in turn"
        ),
        0,
        0,
    ),
    "S7": ("longest silence of `/live` while each body and template of cases/upper is sent, ms", 250, 50),
    "S8": (
        "Redis time of each script and command at 100,000 entries or keys ÷ at 1,000, worst of all",
        3,
        1.5,
    ),
}
"""Text, bound (`must`) and aim of each row."""

GROUPS: Groups = (
    (("S1",), cold_starts),
    (("S2",), echoes),
    (("S3",), discoveries),
    (("S4",), redis_cost("S4")),
    (("S5",), redis_cost("S5", "--router-mode", "round_robin")),
    (("S6",), refusals),
    (("S7",), silences),
    (("S8",), walks),
)
"""The rows of each measurement."""


def main() -> None:
    """Run the suite, or the rows of the command line."""
    run_suite("start", __doc__, BOUNDS, GROUPS, _conditions)


def _conditions(wanted: set[str], _: int) -> list[str]:
    """Return the conditions of the measurement that a reader needs to judge the figures."""
    rival = f"rival of S2: {DYNAMO}, discovery by file, same worker and client files, alternating rounds"
    return [rival] if "S2" in wanted else []


if __name__ == "__main__":
    main()
