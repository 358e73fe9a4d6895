"""H5: routing decisions made blind while two router services restart one after the other.

Eight workers with the mock engine hold blocks of 64 prompts. A client has a router service choose a worker
for each of 2,000 requests, at a fixed pace, as a frontend does. Every tenth request is also sent through a
router, so that events go on. At moments that the seed fixes one router is stopped (SIGTERM) and, once its
process has ended, started again; when that one serves, the other.

A decision is blind if the router does not know the blocks of a worker that is listed (`blind` in its answer),
or if no router answered: a frontend would then choose by load.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import uvloop

from benchmarks.ha.load import PREFIX
from benchmarks.harness.processes import redis_server
from benchmarks.harness.report import Measured
from dynamo_redis.errors import DynamoRedisError
from dynamo_redis.runtime import Client, DistributedRuntime, Settings

WORKERS: Final = 8
ROUTERS: Final = 2
DECISIONS: Final = 2_000
DECISIONS_PER_S: Final = 100.0
SENT_EVERY: Final = 10
"""One of so many decisions is followed by a request through a router."""
PROMPTS: Final = 64
PROMPT_TOKENS: Final = 512
BLOCK_TOKENS: Final = 16
RESTART_AFTER_S: Final = (0.5, 2.0)
_READY_S: Final = 60.0
_END_S: Final = 20.0
_CALL_S: Final = 10.0


def router_restarts(rounds: int) -> dict[str, Measured]:
    """Measure H5: the worst of all rounds."""
    worst = 0
    with redis_server() as server:
        for seed in range(1, rounds + 1):
            counts = uvloop.run(_round(random.Random(seed), server.url, f"{PREFIX}-{seed}"))
            blind_count = counts["blind"] + counts["unanswered"]
            worst = max(worst, blind_count)
            print(
                f"H5 round {seed}: {blind_count} of {DECISIONS} decisions were blind, of which"
                f" {counts['unanswered']} had no router; {counts['failed']} requests failed;"
                f" {counts['matched']} decisions found blocks",
                flush=True,
            )
            if counts["matched"] < DECISIONS // 2:
                raise RuntimeError("the routers know too few blocks: the figure says nothing")
    return {"H5": Measured(float(worst), None, None, rounds)}


async def _round(rng: random.Random, redis_url: str, prefix: str) -> Counter[str]:
    options = ("--redis-url", redis_url, "--redis-prefix", prefix)
    async with AsyncExitStack() as stack:
        for _ in range(WORKERS):
            await stack.enter_async_context(_service("worker", "mock", "--speedup-ratio", "0", *options))
        routers = Routers(options)
        stack.push_async_callback(routers.stop)
        await routers.start()
        settings = Settings.load(redis_url=redis_url, prefix=prefix, tcp_host="127.0.0.1")
        runtime = await stack.enter_async_context(DistributedRuntime(settings=settings))
        decisions = await Decisions.open(runtime, rng)
        stack.push_async_callback(decisions.aclose)
        await decisions.fill_caches()
        flow = asyncio.create_task(decisions.flow())
        await routers.restart_all(rng)
        if flow.done():
            raise RuntimeError("the restarts took longer than the decisions: lower DECISIONS_PER_S")
        return await flow


# ---------------------------------------------------------------------- the processes


async def _start(*arguments: str) -> Process:
    """Start a command and wait until it says that it serves. Raises RuntimeError, TimeoutError."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dynamo_redis", *arguments),
        stdout=PIPE,
        stderr=DEVNULL,
        env={**os.environ, "DYN_LOG": "error"},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(_READY_S):
            while not (line := await process.stdout.readline()).startswith(b"ready"):
                if not line:
                    raise RuntimeError(f"`dynamo-redis {' '.join(arguments)}` ended before it served")
    except BaseException:
        await _end(process)
        raise
    return process


async def _end(process: Process) -> None:
    """End a process in order; kill it if that takes too long."""
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


@asynccontextmanager
async def _service(*arguments: str) -> AsyncIterator[None]:
    process = await _start(*arguments)
    try:
        yield
    finally:
        await _end(process)


class Routers:
    """The router services."""

    def __init__(self, options: tuple[str, ...]) -> None:
        self._command = ("router", "--kv-cache-block-size", str(BLOCK_TOKENS), *options)
        self._processes: list[Process] = []

    async def start(self) -> None:
        """Start all, one after the other."""
        for _ in range(ROUTERS):
            self._processes.append(await _start(*self._command))

    async def restart_all(self, rng: random.Random) -> None:
        """Restart one after the other; the next one begins when the last one serves."""
        for number, process in enumerate(self._processes):
            await asyncio.sleep(rng.uniform(*RESTART_AFTER_S))
            await _end(process)
            self._processes[number] = await _start(*self._command)

    async def stop(self) -> None:
        """End all."""
        await asyncio.gather(*map(_end, self._processes))


# ---------------------------------------------------------------------- the decisions


class Decisions:
    """Asks routers for workers, as a frontend does."""

    def __init__(self, choosing: Client, generating: Client, rng: random.Random) -> None:
        self._choosing = choosing
        self._generating = generating
        self._rng = rng
        self._prompts = [[rng.randrange(2, 900) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
        self._counts: Counter[str] = Counter()

    @classmethod
    async def open(cls, runtime: DistributedRuntime, rng: random.Random) -> Decisions:
        """Open clients of both endpoints of the routers, and wait for all routers."""
        clients = []
        for name in ("best_worker_id", "generate"):
            clients.append(client := await runtime.endpoint(f"dynamo.router.{name}").client())
            async with asyncio.timeout(_READY_S):
                while len(client.instance_ids()) < ROUTERS:
                    await asyncio.sleep(0.02)
        choosing, generating = clients
        return cls(choosing, generating, rng)

    async def aclose(self) -> None:
        """Close both clients."""
        await self._choosing.aclose()
        await self._generating.aclose()

    async def fill_caches(self) -> None:
        """Send each prompt once. Raises RuntimeError if one fails."""
        for prompt in self._prompts:
            await self._send(prompt)
        if self._counts["failed"]:
            raise RuntimeError(f"{self._counts['failed']} of {PROMPTS} requests failed before any restart")

    async def flow(self) -> Counter[str]:
        """Make all decisions; return how many were `blind`, `unanswered`, and `matched` blocks, and how many
        requests `failed`."""
        began = time.monotonic()
        asking: list[asyncio.Task[None]] = []
        for number in range(DECISIONS):
            await asyncio.sleep(max(0.0, began + number / DECISIONS_PER_S - time.monotonic()))
            prompt = self._rng.choice(self._prompts)
            asking.append(asyncio.create_task(self._decide(prompt)))
            if number % SENT_EVERY == 0:
                tail = [self._rng.randrange(2, 900) for _ in range(2 * BLOCK_TOKENS)]
                asking.append(asyncio.create_task(self._send(prompt + tail)))
        await asyncio.gather(*asking)
        return self._counts

    async def _decide(self, prompt: list[int]) -> None:
        try:
            async with asyncio.timeout(_CALL_S):
                asked = {"token_ids": prompt, "hold": True}
                async with await self._choosing.round_robin(asked, annotated=False) as call:
                    choice: dict[str, Any] = await anext(aiter(call))
        except (DynamoRedisError, TimeoutError, StopAsyncIteration) as exc:
            self._counts["unanswered"] += 1
            print(f"H5: no router chose: {exc!r}", flush=True)
            return
        self._counts["blind"] += choice["blind"]
        self._counts["matched"] += choice["overlap_blocks"] > 0

    async def _send(self, prompt: list[int]) -> None:
        request = {
            "model": "demo",
            "token_ids": prompt,
            "stop_conditions": {"max_tokens": 1},
            "sampling_options": {},
            "eos_token_ids": [],
        }
        try:
            async with asyncio.timeout(_CALL_S):
                async with await self._generating.round_robin(request, annotated=False) as call:
                    async for _ in call:
                        pass
        except (DynamoRedisError, TimeoutError) as exc:
            self._counts["failed"] += 1
            print(f"H5: a request failed: {exc!r}", flush=True)
