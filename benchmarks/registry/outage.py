"""R8 and R9: the effect on users when a host loses its power, and when Redis is down.

R8  A client sends a request each 10 ms, in turn to two workers, of which one loses its power. A request that
    is not answered within `LATE_S` went to that one. The figure is the time from switching off to the sending
    of the last such request. Its answer then comes from the other worker, later.
R9  A frontend and two mock workers (2 ms a token), and chats of 16 tokens at a fixed pace: stretches with
    Redis and without it (kill -9 at the stretch's start) take turns.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import ExitStack

import uvloop

from benchmarks.harness.chats import Chatter, first_model
from benchmarks.harness.processes import redis_server, running, up
from benchmarks.harness.report import Measured
from benchmarks.registry.powerless import WORKER, Host, powerless_worker
from dynamo_redis.runtime import Client, DistributedRuntime, Settings
from dynamo_redis.store.server import EmbeddedServer

PREFIX = "bench-outage"
REQUEST_EVERY_S = 0.01
BEFORE_S, AFTER_S = 1.0, 3.5
LATE_S = 0.2
BACK_S = 20.0

CHATS_PER_S = 60.0
STRETCH_S = 5.0
SETTLE_S = 3.0


def powered_off(rounds: int) -> dict[str, Measured]:
    """Measure R8, in s."""
    with ExitStack() as stack:
        server = stack.enter_context(redis_server(port=None))
        environment = {"DYN_REDIS_URL": server.url, "DYN_REDIS_PREFIX": PREFIX, "DYN_LOG": "error"}
        stack.enter_context(running(WORKER, environment))
        host = stack.enter_context(powerless_worker(environment))
        return {"R8": Measured.alone(uvloop.run(_powered_off(server.url, host, rounds)))}


async def _powered_off(redis_url: str, host: Host, rounds: int) -> list[float]:
    figures = []
    settings = Settings.load(redis_url=redis_url, prefix=PREFIX)
    async with DistributedRuntime(settings=settings) as runtime:
        client = await runtime.endpoint("bench.echo.generate").client()
        for number in range(rounds):
            await _wait_until_both_answer(client)
            late, slowest_s = await _switch_off(client, host)
            figures.append(late)
            print(
                f"R8 round {number + 1} ({host.kind}): avoided after {late:.2f} s, "
                f"slowest request {slowest_s:.2f} s",
                flush=True,
            )
    return figures


async def _switch_off(client: Client, host: Host) -> tuple[float, float]:
    """Return the time from the host's switching off to the sending of the last request to it, and the slowest
    request, both in s."""
    requests: list[asyncio.Task[tuple[float, float]]] = []
    began = time.monotonic()
    off_at = float("inf")
    while (now := time.monotonic()) < began + BEFORE_S + AFTER_S:
        if off_at == float("inf") and now >= began + BEFORE_S:
            await asyncio.to_thread(host.switch_off)
            off_at = time.monotonic()
        requests.append(asyncio.create_task(_request(client)))
        await asyncio.sleep(REQUEST_EVERY_S)
    answered = await asyncio.gather(*requests)
    await asyncio.to_thread(host.switch_on)
    late = [sent_at - off_at for sent_at, took_s in answered if took_s > LATE_S]
    if not late:
        raise RuntimeError("no request went to the host that was switched off")
    return max(late), max(took_s for _, took_s in answered)


async def _request(client: Client) -> tuple[float, float]:
    sent_at = time.monotonic()
    async for _ in await client.round_robin("ping", annotated=False):
        pass
    return sent_at, time.monotonic() - sent_at


async def _wait_until_both_answer(client: Client) -> None:
    """Wait until both workers are listed and each has answered: the client has connections to both."""
    async with asyncio.timeout(BACK_S):
        while len(client.instance_ids()) < 2:
            await asyncio.sleep(0.05)
        for instance_id in client.instance_ids():
            async for _ in await client.direct("ping", instance_id, annotated=False):
                pass
    await asyncio.sleep(BEFORE_S)


def without_redis(rounds: int) -> dict[str, Measured]:
    """Measure R9: p99 in ms, without Redis and with it."""
    with redis_server() as server:
        options = ("--redis-url", server.url, "--redis-prefix", PREFIX, "--decode-step", "2ms")
        with up(*options) as url:
            return {"R9": Measured.against(*uvloop.run(_without_redis(server, url, rounds)))}


async def _without_redis(server: EmbeddedServer, url: str, rounds: int) -> tuple[list[float], list[float]]:
    model = await asyncio.to_thread(first_model, url, BACK_S)
    chats = PacedChats(url, model)
    up_ms: list[float] = []
    down_ms: list[float] = []
    await chats.stretch(STRETCH_S)
    for number in range(rounds):
        up_ms.append(await chats.stretch(STRETCH_S))
        await server.kill()
        down_ms.append(await chats.stretch(STRETCH_S))
        await server.start()
        await asyncio.sleep(SETTLE_S)
        print(
            f"R9 round {number + 1}: p99 of a chat {down_ms[-1]:.1f} ms without Redis, "
            f"{up_ms[-1]:.1f} ms with it",
            flush=True,
        )
    chats.close()
    return down_ms, up_ms


class PacedChats:
    """Chats at a fixed pace. Each uses a kept connection that is free, or a new one."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model
        self._free: list[Chatter] = []
        self._count = 0

    async def stretch(self, seconds: float) -> float:
        """Send chats for `seconds`, and return their p99 in ms. Raises if one fails."""
        chats: list[asyncio.Task[float]] = []
        began = time.monotonic()
        for number in range(round(seconds * CHATS_PER_S)):
            await asyncio.sleep(max(0.0, began + number / CHATS_PER_S - time.monotonic()))
            chats.append(asyncio.create_task(self._chat()))
        times = sorted(await asyncio.gather(*chats))
        return 1e3 * times[len(times) * 99 // 100]

    async def _chat(self) -> float:
        began = time.monotonic()
        self._count += 1
        chatter = self._free.pop() if self._free else await Chatter.open(self._url)
        await chatter.chat(self._model, f"Question {os.getpid()}-{self._count}?")
        self._free.append(chatter)
        return time.monotonic() - began

    def close(self) -> None:
        """Close all connections."""
        for chatter in self._free:
            chatter.close()
