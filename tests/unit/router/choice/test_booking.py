"""Choosing and booking in one step, and every way in which a booking ends."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dynamo_redis.errors import DeadlineExceeded, NoInstances, Overloaded
from dynamo_redis.router.base import BusyThresholds, CostWeights, Matched, RoutingRequest, Worker, WorkerLoad
from dynamo_redis.router.choice.booking import Booking, BookingChooser
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.selector import Selector
from dynamo_redis.router.choice.waiting_line import WaitingLines

BLOCK = 16
ONE, TWO, THREE = Worker(1), Worker(2), Worker(3)
FAR = 1e12


class Crowd:
    """The workers to choose from, and the busy ones."""

    def __init__(self, *workers: Worker) -> None:
        self.workers = list(workers)
        self.busy: set[Worker] = set()

    def candidates(self, among: Collection[int] | None, excluded: Collection[int]) -> Sequence[Worker]:
        return [
            worker
            for worker in self.workers
            if (among is None or worker.instance_id in among) and worker.instance_id not in excluded
        ]

    def without_busy(
        self, workers: Sequence[Worker], book: LoadBook, busy: BusyThresholds | None
    ) -> Sequence[Worker]:
        return [worker for worker in workers if worker not in self.busy]


class Ear:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def added(self, booking: Booking) -> None:
        self.heard.append(("added", booking.request_id))

    def prefill_done(self, request_id: str) -> None:
        self.heard.append(("prefill_done", request_id))

    def freed(self, request_id: str) -> None:
        self.heard.append(("freed", request_id))


class Bench:
    """A chooser with all that it needs."""

    def __init__(self, *workers: Worker, held: dict[Worker, Matched] | None = None, line: int = 8) -> None:
        self.crowd = Crowd(*workers)
        self.book = LoadBook()
        self.ear = Ear()
        self.predicted: list[tuple[Worker, list[int]]] = []
        self.held = held or {}
        self.lines = WaitingLines(line)
        self.chooser = BookingChooser(
            "me",
            lambda hashes: self.held if hashes else {},
            self.crowd,
            self.book,
            Selector(random.Random(1)),
            self.lines,
            block_size=BLOCK,
            weights=CostWeights(),
            predict=lambda worker, hashes: self.predicted.append((worker, list(hashes))),
            listener=self.ear,
        )

    def load(self, worker: Worker) -> WorkerLoad:
        return self.book.load(worker)


def request(request_id: str = "r", tokens: int = 100, **more: Any) -> RoutingRequest:
    return RoutingRequest(
        request_id, hashes=list(range(tokens // BLOCK)), token_count=tokens, **{"deadline": FAR, **more}
    )


async def test_worker_need_not_read_blocks_that_it_holds() -> None:
    bench = Bench(ONE, TWO, held={TWO: Matched(4)})
    choice = await bench.chooser.choose(request())
    assert choice.worker == TWO
    assert choice.matched == Matched(4)
    assert bench.load(TWO) == WorkerLoad(prefill_tokens=100 - 4 * BLOCK, blocks=7, request_count=1)
    assert bench.predicted == [(TWO, list(range(6)))]
    bench.chooser.prefill_done("r")
    assert bench.load(TWO) == WorkerLoad(0, 7, 1)
    bench.chooser.free("r")
    assert bench.load(TWO) == WorkerLoad(0, 0, 0)
    assert bench.ear.heard == [("added", "r"), ("prefill_done", "r"), ("freed", "r")]


async def test_two_requests_of_one_tick_see_each_other() -> None:
    bench = Bench(ONE, TWO)
    choices = [await bench.chooser.choose(request(name)) for name in "abcd"]
    assert sorted(choice.worker for choice in choices) == [ONE, ONE, TWO, TWO]


async def test_a_shared_beginning_counts_once() -> None:
    """As Dynamo's potential blocks do: so a worker that holds a system prompt keeps its chats."""
    bench = Bench(ONE, TWO, held={ONE: Matched(400)})
    system = list(range(400))
    for number in range(20):
        own = range(1000 * number + 1000, 1000 * number + 1004)
        choice = await bench.chooser.choose(
            RoutingRequest(str(number), hashes=[*system, *own], token_count=404 * BLOCK, deadline=FAR)
        )
        assert choice.worker == ONE
        assert bench.load(ONE).blocks == 400 + 4 * (number + 1)
        bench.chooser.prefill_done(str(number))
    explained = bench.chooser.explain(replace(request(), hashes=system, token_count=404 * BLOCK))
    assert [cost.decode_blocks for cost in explained.costs] == [400 + 4 * 20 + 4, 404]


async def test_a_request_that_is_booked_has_its_choice_again() -> None:
    bench = Bench(ONE, TWO)
    first = await bench.chooser.choose(request())
    assert await bench.chooser.choose(request()) is first
    assert bench.book.booking_count == 1


async def test_retry_ends_old_booking_and_takes_another_worker() -> None:
    bench = Bench(ONE, TWO, held={ONE: Matched(6)})
    assert (await bench.chooser.choose(request())).worker == ONE
    again = await bench.chooser.choose(replace(request(), excluded={ONE.instance_id}))
    assert again.worker == TWO
    assert bench.load(ONE) == WorkerLoad(0, 0, 0)
    assert bench.load(TWO).request_count == 1
    with pytest.raises(NoInstances):
        await bench.chooser.choose(replace(request(), excluded={1, 2}))
    assert bench.book.booking_count == 0


async def test_listener_hears_of_each_change_once() -> None:
    bench = Bench(ONE)
    await bench.chooser.choose(request())
    for _ in range(2):
        bench.chooser.prefill_done("r")
    for _ in range(2):
        bench.chooser.free("r")
    bench.chooser.prefill_done("r")
    assert bench.ear.heard == [("added", "r"), ("prefill_done", "r"), ("freed", "r")]


async def test_a_booking_ends_with_its_deadline() -> None:
    bench = Bench(ONE)
    await bench.chooser.choose(request("late", deadline=10.0))
    await bench.chooser.choose(request("later", deadline=20.0))
    bench.chooser.expire(15.0)
    assert list(bench.chooser.bookings) == ["later"]
    assert bench.load(ONE).request_count == 1
    assert bench.ear.heard[-1] == ("freed", "late")


async def test_only_those_that_may_be_are_chosen() -> None:
    bench = Bench(ONE, TWO, THREE)
    assert (await bench.chooser.choose(request(among={3}))).worker == THREE
    with pytest.raises(NoInstances):
        await bench.chooser.choose(request("other", among={4}))


async def test_busy_workers_are_left_alone_and_requests_wait_for_them() -> None:
    bench = Bench(ONE, TWO, held={ONE: Matched(6)})
    bench.crowd.busy = {ONE}
    assert (await bench.chooser.choose(request("a"))).worker == TWO
    bench.crowd.busy = {ONE, TWO}
    async with asyncio.TaskGroup() as tasks:
        waits = tasks.create_task(bench.chooser.choose(request("b")))
        await asyncio.sleep(0)
        assert len(bench.lines) == 1
        bench.crowd.busy = {ONE}
        bench.chooser.free("a")  # this wakes the requests that wait
        assert (await waits).worker == TWO


async def test_models_do_not_wait_for_each_other() -> None:
    """Two models of one endpoint, each with a worker: one is busy, and more wait for it than may."""
    bench = Bench(ONE, TWO, line=1)
    bench.crowd.busy = {ONE}
    waits = asyncio.ensure_future(bench.chooser.choose(request("a", among={1})))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await bench.chooser.choose(request("b", among={1}))
    async with asyncio.timeout(30):
        assert (await bench.chooser.choose(request("c", among={2}))).worker == TWO
    bench.crowd.busy = set()
    bench.lines.wake()
    assert (await waits).worker == ONE


async def test_a_retry_does_not_queue_again() -> None:
    bench = Bench(ONE, TWO)
    await bench.chooser.choose(request())
    bench.crowd.busy = {ONE, TWO}
    assert (await bench.chooser.choose(replace(request(), excluded={1}))).worker == TWO


async def test_waiting_is_bounded_in_number_and_time() -> None:

    bench = Bench(ONE, line=1)
    bench.crowd.busy = {ONE}
    waits = asyncio.ensure_future(bench.chooser.choose(request("a", deadline=time.monotonic() + 0.05)))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await bench.chooser.choose(request("b"))
    with pytest.raises(DeadlineExceeded):
        await waits
    assert bench.book.booking_count == 0


async def test_an_explanation_books_nothing_and_names_every_cost() -> None:
    bench = Bench(ONE, TWO, held={TWO: Matched(4)})
    choice = bench.chooser.explain(request())
    assert choice.worker == TWO
    assert [(cost.worker, cost.matched.device) for cost in choice.costs] == [(ONE, 0), (TWO, 4)]
    assert bench.book.booking_count == 0
    assert bench.ear.heard == []
