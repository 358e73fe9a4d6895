"""Requests that run, wait or are refused at a full worker, as callers see it. A client is a connection."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import DeadlineExceeded, Overloaded
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames.admission import RESERVED_COUNT
from dynamo_redis.planes.frames.response_stream import FrameResponseStream
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from tests.tcp_plane import INSTANCE, SECRET, eventually


class Worker:
    """A server whose handlers end one by one, at the command of the test; `started` are their requests."""

    def __init__(self, settings: PlaneSettings, server: TcpServer) -> None:
        self.settings = settings
        self.server = server
        self.target = Target(INSTANCE, server.address, "test", SECRET)
        self.started: list[str] = []
        self.most_running = 0
        self._gates: list[asyncio.Event] = []
        server.register("test", self._handle)

    async def _handle(self, request: str, _: Context) -> str:
        self.started.append(request)
        self.most_running = max(self.most_running, self.server.admission.running_count)
        gate = asyncio.Event()
        self._gates.append(gate)
        await gate.wait()
        return request

    async def finish_one(self) -> None:
        """End the oldest handler, and wait until the next in turn has started."""
        started = len(self.started)
        waiting = self.server.admission.waiting_count
        self._gates.pop(0).set()
        await eventually(lambda: len(self.started) == started + min(1, waiting))

    async def finish_all(self) -> None:
        while self.server.in_flight_count:
            for gate in self._gates:
                gate.set()
            self._gates.clear()
            await asyncio.sleep(0)

    async def has(self, count: int) -> None:
        """Wait until that many requests run or wait, and the running handlers have begun."""
        admission = self.server.admission
        await eventually(
            lambda: self.server.in_flight_count == count and len(self._gates) == admission.running_count
        )


class Caller:
    """One connection, and its pending answers."""

    def __init__(self, worker: Worker, client: TcpClient) -> None:
        self._target = worker.target
        self._client = client
        self.answers: list[asyncio.Task[str | Exception]] = []

    def ask(self, name: str, count: int = 1, context: Context | None = None) -> asyncio.Task[str | Exception]:
        """Send requests; return the task of the last one's answer."""
        for _ in range(count):
            stream = self._client.open(self._target, name, context or Context())
            self.answers.append(asyncio.ensure_future(_answer(stream)))
        return self.answers[-1]

    async def outcomes(self) -> Counter[Any]:
        """Count the ends of the requests: an answer, or the error's type."""
        return Counter(
            end if isinstance(end, str) else type(end) for end in await asyncio.gather(*self.answers)
        )


async def _answer(stream: FrameResponseStream) -> str | Exception:
    try:
        return str(await anext(stream))
    except Exception as exc:  # noqa: BLE001 - the test looks at it
        return exc


@asynccontextmanager
async def working(callers: int, **overrides: Any) -> AsyncIterator[tuple[Worker, list[Caller]]]:
    """Run a worker and callers of it; check at the end that nothing is left of any request."""
    settings = PlaneSettings.load(tcp_host="127.0.0.1", keepalive_interval_s=30.0, **overrides)
    server = TcpServer(settings, secret=SECRET, instance_id=INSTANCE)
    await server.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.aclose)
        worker, made = Worker(settings, server), []
        for _ in range(callers):
            client = TcpClient(settings)
            stack.push_async_callback(client.aclose)
            await client.probe(worker.target, timeout_s=20)  # what waits for a connection has its own bound
            made.append(Caller(worker, client))
        yield worker, made
        await worker.finish_all()
        await asyncio.gather(*(answer for caller in made for answer in caller.answers))
        assert list(server.admission) == []
        assert server.admission.waiting_count == server.in_flight_count == 0


# --------------------------------------------------------------------------- turns


async def test_flood_delays_another_caller_by_one_turn() -> None:
    async with working(2, max_in_flight_count=4, max_queued_count=5000) as (worker, [flood, modest]):
        flood.ask("flood", 5000)
        await worker.has(5000)
        for _ in range(20):
            before = len(worker.started)
            modest.ask("modest")
            await worker.has(worker.server.in_flight_count + 1)
            while worker.started[before:].count("modest") == 0:
                assert len(worker.started) - before < 2, "it waited for more than one other"
                await worker.finish_one()
        assert worker.server.admission.running_count == 4  # whatever has to wait, no slot stands idle
        await worker.finish_all()
        assert await modest.outcomes() == {"modest": 20}
        assert await flood.outcomes() == {"flood": 5000}
        assert worker.most_running == 4


async def test_fifty_callers_are_served_in_rounds() -> None:
    async with working(50, max_in_flight_count=1, max_queued_count=1000) as (worker, callers):
        for number, caller in enumerate(callers):
            caller.ask(str(number), 10)
        await worker.has(500)
        served = Counter({str(number): 0 for number in range(50)})
        served.update(worker.started)
        while worker.server.admission.waiting_count:
            await worker.finish_one()
            served[worker.started[-1]] += 1
            assert max(served.values()) - min(served.values()) <= 2, "a caller was passed over"
        assert set(served.values()) == {10}


async def test_requests_of_a_caller_start_in_order() -> None:
    async with working(2, max_in_flight_count=1, max_queued_count=100) as (worker, [one, other]):
        for number in range(10):
            one.ask(f"one {number}")
            other.ask(f"other {number}")
        await worker.has(20)
        while worker.server.admission.waiting_count:
            await worker.finish_one()
        for name in ("one", "other"):
            mine = [request for request in worker.started if request.startswith(name)]
            assert mine == [f"{name} {number}" for number in range(10)]


# --------------------------------------------------------------------------- a full queue


async def test_most_crowded_caller_makes_room() -> None:
    async with working(4, max_in_flight_count=2, max_queued_count=12) as (worker, [flood, *others]):
        for number in range(14):
            flood.ask(f"flood {number}")
        await worker.has(14)
        for _ in range(5):
            for other in others:
                other.ask("other")
        await eventually(
            lambda: sum(answer.done() for caller in [flood, *others] for answer in caller.answers) == 15
        )
        assert worker.server.in_flight_count == 14
        refused = [await answer for answer in flood.answers if answer.done()]
        assert len(refused) == 9  # each of four has three of the twelve places
        assert all(isinstance(error, Overloaded) and error.retry_after_s for error in refused)
        assert not any(answer.done() for answer in flood.answers[:5]), "the newest go first"
        for other in others:
            assert [answer.done() for answer in other.answers] == [False, False, False, True, True]
        await worker.finish_all()
        served: dict[Any, int] = {f"flood {number}": 1 for number in range(5)}
        assert await flood.outcomes() == {Overloaded: 9, **served}
        assert [await other.outcomes() for other in others] == [{"other": 3, Overloaded: 2}] * 3


async def test_caller_with_most_waiting_requests_is_refused() -> None:
    async with working(2, max_in_flight_count=1, max_queued_count=3) as (worker, [flood, modest]):
        flood.ask("flood", 3)
        modest.ask("modest")
        await worker.has(4)
        assert isinstance(await flood.ask("flood"), Overloaded)
        assert worker.server.in_flight_count == 4
        await worker.finish_all()
        assert await modest.outcomes() == {"modest": 1}


async def test_worker_without_a_queue_refuses_at_once() -> None:
    async with working(2, max_in_flight_count=1, max_queued_count=0) as (worker, [first, second]):
        first.ask("first")
        await worker.has(1)
        refused = await second.ask("second")
        assert isinstance(refused, Overloaded)
        assert refused.retry_after_s == 1.0  # it has not seen how fast requests finish


@pytest.mark.parametrize("ending", ["cancelled", "deadline", "connection"])
async def test_waiting_request_that_ends_frees_its_place(ending: str) -> None:
    async with working(3, max_in_flight_count=1, max_queued_count=1) as (worker, [first, second, third]):
        first.ask("first")
        await worker.has(1)
        context = Context(deadline=time.monotonic() + 0.2 if ending == "deadline" else None)
        waiting = second.ask("second", context=context)
        if ending != "deadline":
            await worker.has(2)
        if ending == "cancelled":
            context.kill()
        elif ending == "connection":
            await second._client.aclose()
        end = await waiting
        assert isinstance(end, Exception)
        if ending == "deadline":
            assert isinstance(end, DeadlineExceeded)
        await worker.has(1)
        assert worker.server.admission.waiting_count == 0
        stats = worker.server.stats("test")
        assert stats is not None
        assert (stats.request_count, stats.error_count + stats.cancelled_count) == (1, 1)
        assert stats.duration_counts[-1] == stats.average_s == 0  # its handler has not begun
        third.ask("third")
        await worker.has(2)
        await worker.finish_all()
        assert worker.started == ["first", "third"]


# --------------------------------------------------------------------------- the hint


async def test_retry_hint_is_the_time_that_the_queue_takes() -> None:
    """A worker of a known rate gives a hint close to the time that it then takes."""
    settings = PlaneSettings.load(tcp_host="127.0.0.1", max_in_flight_count=2, max_queued_count=60)
    server = TcpServer(settings, secret=SECRET, instance_id=INSTANCE)
    await server.start()
    client = TcpClient(settings)

    async def handle(request: Any, _: Context) -> Any:
        await asyncio.sleep(0.02)
        return request

    server.register("test", handle)
    target = Target(INSTANCE, server.address, "test", SECRET)
    try:
        answers = [asyncio.ensure_future(_answer(client.open(target, "x", Context()))) for _ in range(62)]
        await eventually(lambda: server.in_flight_count <= 40 and answers[0].done())
        answers += [asyncio.ensure_future(_answer(client.open(target, "x", Context()))) for _ in range(50)]
        asked_at = time.monotonic()
        done, _ = await asyncio.wait(answers[62:], return_when=asyncio.FIRST_COMPLETED)
        refused = [end for answer in done if isinstance(end := answer.result(), Overloaded)]
        assert refused
        hint_s = refused[0].retry_after_s
        assert hint_s is not None
        await asyncio.gather(*answers)
        took_s = time.monotonic() - asked_at
        assert took_s / 3 < hint_s < took_s * 3
    finally:
        await client.aclose()
        await server.aclose()


# --------------------------------------------------------------------------- the reserve of each endpoint


async def test_full_worker_answers_on_its_other_endpoints() -> None:
    async with working(1, max_in_flight_count=1, max_queued_count=1) as (worker, [caller]):

        async def load(request: str, _: Context) -> str:
            return request

        worker.server.register("load_metrics", load)
        caller.ask("generate", 2)
        await worker.has(2)
        assert isinstance(await caller.ask("generate"), Overloaded)
        target = replace(worker.target, subject="load_metrics")
        for client in (caller._client, TcpClient(worker.settings)):
            for number in range(5):
                assert await _answer(client.open(target, str(number), None)) == str(number)
        await client.aclose()
        assert worker.server.admission.running_count == 1
        assert worker.started == ["generate"]


async def test_reserve_is_bounded_and_leaves_the_limit() -> None:
    async with working(2, max_in_flight_count=64, max_queued_count=1000) as (worker, [caller, other]):
        worker.server.register("other", worker._handle)
        other._target = replace(worker.target, subject="other")
        caller.ask("test", 100)
        await worker.has(100)
        assert worker.server.admission.running_count == 64
        other.ask("other", 100)
        await worker.has(200)
        assert worker.server.admission.running_count == 64 + RESERVED_COUNT
        for _ in range(RESERVED_COUNT):
            worker._gates.pop(0).set()
        await eventually(lambda: worker.server.admission.running_count == 64)
        await worker.finish_all()
        assert await other.outcomes() == {"other": 100}
        assert worker.most_running == 64 + RESERVED_COUNT
