"""A router replica of a replay, and its users: `python -m benchmarks.replay.router PLAN REPLICA FILE`.

It sends its share of the trace's requests as token ids, each when it is due, and appends a line to FILE for
each first token and each error. It answers {"ready": true}, and to commands:

    go AT             begin: the first request is due at AT, by this machine's monotonic clock; requests
                      that were due before now are left out. Then now and then, and at the end:
                      {"answered": count, "finished": …, "blocks": in the index, "late_s": 99th percentile}
    index DIRECTORY   write the blocks of each worker in its index   {"state": …}
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from array import array
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Final, Protocol

import uvloop

from benchmarks.replay.figures import Outcome, quantile
from benchmarks.replay.lines import answer, commands
from benchmarks.replay.oracle import write_blocks
from benchmarks.replay.plan import ENDPOINT, MODEL, Chance, Plan
from benchmarks.replay.trace import TRACE_BLOCK_SIZE, TracedRequest
from dynamo_redis.errors import DynamoRedisError
from dynamo_redis.names import EndpointName
from dynamo_redis.router.kv_router import KvRouter
from dynamo_redis.router.routed_call import RoutedCall
from dynamo_redis.runtime import Client, DistributedRuntime
from dynamo_redis.runtime.call import Call
from dynamo_redis.wire.kv_event import DEVICE

_INSTANCES_S: Final = 30.0
_PROGRESS_S: Final = 0.5


class Caller(Protocol):
    """The client or router that requests go through."""

    def generate(self, request: Any, annotated: bool | None = True) -> Awaitable[AsyncIterator[Any]]: ...


@asynccontextmanager
async def open_caller(runtime: DistributedRuntime, plan: Plan, chance: Chance) -> AsyncIterator[Caller]:
    """Yield the router of the plan's mode, once all workers can be chosen."""
    async with AsyncExitStack() as stack:
        client: Client = await runtime.endpoint(ENDPOINT).client(router_mode=plan.client_mode)
        stack.push_async_callback(client.aclose)
        async with asyncio.timeout(_INSTANCES_S):
            while len(client.instance_ids()) < plan.workers:
                await asyncio.sleep(0.02)
        if plan.client_mode is not None:
            yield client
            return
        endpoint = EndpointName.parse(ENDPOINT)
        router = KvRouter(runtime, endpoint, plan.router, block_size=TRACE_BLOCK_SIZE, rng=chance)
        yield await stack.enter_async_context(router)


class Users:
    """The users of one replica, which send its share of the requests, and the outcomes.

    Args:
        plan: The run's plan.
        replica: Number of this replica, from 0.
        caller: Client or router that requests go through.
        chance: Chance among equal workers, told of each request.
        record: File that outcomes are written to.
    """

    def __init__(self, plan: Plan, replica: int, caller: Caller, chance: Chance, record: IO[str]) -> None:
        requests = plan.load_trace().requests
        self._share = [
            (index, request) for index, request in enumerate(requests) if index % plan.replicas == replica
        ]
        self._speedup = plan.speedup
        self._caller = caller
        self._chance = chance
        self._record = record
        self._lateness_s = array("d")
        self._answered_count = 0

    async def run(self, begin: float) -> None:
        """Send each request when it is due, and wait for all answers."""
        started = time.monotonic()
        reporting = asyncio.create_task(self._send_progress_regularly())
        try:
            async with asyncio.TaskGroup() as group:
                for index, request in self._share:
                    due = begin + request.arrival_s / self._speedup
                    if due < started:  # was due while this replica was not running
                        continue
                    await asyncio.sleep(due - time.monotonic())
                    self._lateness_s.append(time.monotonic() - due)
                    group.create_task(self._ask(index, request, due))
        finally:
            reporting.cancel()
        self._send_progress(finished=True)

    async def _send_progress_regularly(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_S)
            self._send_progress()

    def _send_progress(self, *, finished: bool = False) -> None:
        index = self._caller.indexer if isinstance(self._caller, KvRouter) else None
        answer(
            answered=self._answered_count,
            finished=finished,
            blocks=0 if index is None else index.index.block_count,
            late_s=quantile(sorted(self._lateness_s), 0.99) if finished and self._lateness_s else 0.0,
        )

    async def _ask(self, index: int, request: TracedRequest, due: float) -> None:
        body = {
            "model": MODEL,
            "token_ids": request.token_ids(),
            "stop_conditions": {"max_tokens": request.output_count, "ignore_eos": True},
            "sampling_options": {},
            "eos_token_ids": [],
        }
        try:
            self._chance.start_request(index)  # choosing never awaits, so no other request comes in between
            call = await self._caller.generate(body, annotated=False)
            assert isinstance(call, Call)
            first = await anext(call)
            self._write_outcome(index, request, call, first, time.monotonic() - due)
            async for _ in call:
                pass
        except DynamoRedisError as error:
            self._write(index=index, failed=error.code)
        self._answered_count += 1

    def _write_outcome(
        self, index: int, request: TracedRequest, call: Call, first: dict[str, Any], taken_s: float
    ) -> None:
        """Write the outcome of a request whose `first` item came `taken_s` after it was due, in real time."""
        matched = call.choice.matched.device if isinstance(call, RoutedCall) else 0
        outcome = Outcome(
            index=index,
            worker=call.instance_id,
            prompt_count=request.prompt_count,
            cached_count=first["cached_tokens"],
            matched_count=matched * TRACE_BLOCK_SIZE,
            ttft_s=taken_s * self._speedup,
        )
        self._write(**asdict(outcome))

    def _write(self, **fields: Any) -> None:
        print(json.dumps(fields), file=self._record, flush=True)  # it counts even if this process is killed


def write_index(directory: Path, caller: Caller) -> dict[str, Any]:
    """Write the blocks of each worker in a router's index; return the router's state."""
    if not isinstance(caller, KvRouter):
        return {}
    if caller.indexer is not None:
        for worker in caller.indexer.index.workers():
            blocks = caller.indexer.index.blocks_of(worker)[DEVICE]
            write_blocks(directory, worker.instance_id, blocks)
    return caller.state().to_json()


async def main(plan: Plan, replica: int, path: Path) -> None:
    """Carry out commands until told to end."""
    chance = Chance(plan.seed)
    async with (
        DistributedRuntime(settings=plan.settings) as runtime,
        open_caller(runtime, plan, chance) as caller,
    ):
        with path.open("a") as record:
            users = Users(plan, replica, caller, chance, record)
            running: asyncio.Task[None] | None = None
            answer(ready=True)
            async for word, *rest in commands():
                if word == "go":
                    running = asyncio.create_task(users.run(float(rest[0])))
                elif word == "index":
                    answer(state=write_index(Path(rest[0]), caller))
            if running is not None:
                running.cancel()
                await asyncio.wait([running])


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)  # faults cause many warnings
    uvloop.run(main(Plan.from_json(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
