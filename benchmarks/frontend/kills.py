"""F9: the pause that a client sees when the worker of its answer is killed.

Three mock workers, a token each 10 ms. Six answers are under way, two at each worker, when a worker is killed
(kill -9), at a random moment; each must be complete in the end. The figure is the longest pause between two
pieces of an answer that was moved, less the usual one of this answer. Answers of other workers do not count:
as many count as the frontend says were moved, those with the longest pauses. A new worker replaces the killed
one before the next kill.
"""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import time
from contextlib import ExitStack
from functools import partial
from typing import Final, cast

import httpx
import psutil
import uvloop

from benchmarks.frontend.caller import END_OF_BODY, Load
from benchmarks.frontend.prompts import MODEL, Prompts, model_directory
from benchmarks.frontend.sides import Side, await_instances, instances, our_frontend, our_redis, our_worker
from benchmarks.harness.report import Measured

KILLS: Final = 20
"""Kills in a round: a hundred in five rounds."""
WORKERS: Final = 3
ANSWERS: Final = 6
TOKENS: Final = 100
PACE: Final = ("--speedup-ratio", "1", "--decode-step", "10ms", "--decode-sequence", "0")
KILL_AFTER_S: Final = (0.2, 0.7)
LEASE_TTL: Final = "5s"
"""The killed worker is gone from the list after this time; the migration does not wait for it."""
ANSWER_S: Final = 30.0

_MIGRATIONS: Final = re.compile(
    r'^dynamo_frontend_model_migration_total\{[^}]*migration_type="ongoing_request"[^}]*\} (\S+)$',
    re.MULTILINE,
)


class TimedAnswer(asyncio.Protocol):
    """One chat on a connection of its own: the time at which each piece of its answer came."""

    def __init__(self, body: bytes) -> None:
        self.times: list[float] = []
        self._body = body
        self._content = bytearray()
        self._whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the chat."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._body)

    def data_received(self, data: bytes) -> None:
        """Note the time of a piece."""
        self.times.append(time.perf_counter())
        self._content += data
        if self._content.endswith(END_OF_BODY) and not self._whole.done():
            self._whole.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the answer if it is not whole."""
        if not self._whole.done():
            self._whole.set_exception(RuntimeError(f"a connection was lost within an answer: {exc}"))

    async def added_pause_s(self) -> float:
        """Wait for the whole answer; return its longest pause, less its usual one. Raises RuntimeError if it
        is not complete."""
        async with asyncio.timeout(ANSWER_S):
            await self._whole
        assert self._transport is not None
        self._transport.close()
        if b'"completion_tokens":%d' % TOKENS not in self._content or b"[DONE]" not in self._content:
            raise RuntimeError(f"an answer is not whole: {bytes(self._content[-500:])!r}")
        pauses = [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]
        return max(pauses) - statistics.median(pauses)


def kills(rounds: int) -> dict[str, Measured]:
    """Measure F9, in ms: the p99 over all answers that were moved."""
    rng = random.Random(9)
    added: list[float] = []
    unmoved: list[float] = []
    with ExitStack() as stack:
        model = stack.enter_context(model_directory())
        workers = stack.enter_context(our_redis(model))
        workers.environment["DYN_LEASE_TTL_S"] = LEASE_TTL

        def start() -> None:
            workers.pids.append(stack.enter_context(our_worker(workers, "mock", model, *PACE)))

        for _ in range(WORKERS):
            start()
        side = stack.enter_context(our_frontend(workers, "--migration-limit", "3"))
        prompts = Prompts(model, 9)
        for number in range(rounds):
            for _ in range(KILLS):
                victim = workers.pids.pop(0)
                known = await_instances(side, WORKERS)
                others, moved = uvloop.run(_kill_within(side, prompts, victim, rng.uniform(*KILL_AFTER_S)))
                added += [1e3 * pause_s for pause_s in moved]
                unmoved += [1e3 * pause_s for pause_s in others]
                start()
                while not instances(side) - known:
                    time.sleep(0.05)
            print(
                f"F9 round {number + 1}: {len(added)} answers moved so far, added pause p50 "
                f"{statistics.median(added):.1f} ms, p99 {_p99(added):.1f} ms, longest {max(added):.1f} ms; "
                f"others p50 {statistics.median(unmoved):.1f} ms, longest {max(unmoved):.1f} ms",
                flush=True,
            )
    return {"F9": Measured(float(f"{_p99(added):.4g}"), None, None, rounds)}


async def _kill_within(
    side: Side, prompts: Prompts, victim: int, after_s: float
) -> tuple[list[float], list[float]]:
    """Kill a worker while answers are under way. Returns the added pauses of the others, and of those that
    were moved."""
    load = Load(port=side.port, model=MODEL, answer_tokens=TOKENS)
    before = _migrations(side)
    loop = asyncio.get_running_loop()
    answers = []
    for _ in range(ANSWERS):
        answer = partial(TimedAnswer, load.body(prompts.make(load.prompt_tokens)))
        answers.append((await loop.create_connection(answer, "127.0.0.1", side.port))[1])
    await asyncio.sleep(after_s)
    psutil.Process(victim).kill()
    pauses = sorted([await answer.added_pause_s() for answer in answers])
    moved_count = _migrations(side) - before
    if not 0 < moved_count < ANSWERS:
        raise RuntimeError(f"{moved_count} of {ANSWERS} answers were moved")
    return pauses[:-moved_count], pauses[-moved_count:]


def _migrations(side: Side) -> int:
    text = httpx.get(f"{side.url}/metrics", timeout=5).text
    return sum(round(float(found)) for found in _MIGRATIONS.findall(text))


def _p99(values: list[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]
