"""A supervisor leaves out bad values, and starts failed work again."""

from __future__ import annotations

import asyncio
import logging

import pytest

from dynamo_redis.errors import InvalidRecord, StoreUnavailable
from dynamo_redis.supervision import Supervisor

LOG = logging.getLogger("dynamo_redis.test")


def make() -> Supervisor:
    return Supervisor(LOG, "the task", pauses_s=(0.0, 0.0))


def test_bad_value_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    taken: list[int] = []

    def take(value: int) -> None:
        taken.append(10 // value)

    supervisor = make()
    supervisor.each([1, 0, 2], take, lambda value: f"value {value}")
    assert taken == [10, 5]
    assert supervisor.skipped_count == 1
    assert "the task: left out value 0: ZeroDivisionError" in caplog.text
    assert "Traceback" in caplog.text, "a defect is shown with its place"


def test_invalid_record_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    make().skip("v1/x", InvalidRecord("a card", "torn", key="v1/x"))
    assert [record.getMessage() for record in caplog.records] == [
        "the task: left out: v1/x is not a card: torn"
    ]
    assert "Traceback" not in caplog.text


def test_repeated_bad_value_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = make()
    for number in range(100):
        supervisor.skip(f"value {number % 2}", InvalidRecord("a card", "torn"))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "the task: left out value 0: not a card: torn",
        "the task: left out value 1: not a card: torn",
    ]
    assert supervisor.skipped_count == 100


@pytest.mark.anyio
async def test_failed_work_begins_again(caplog: pytest.LogCaptureFixture) -> None:
    outcomes: list[Exception | None] = [RecursionError("deep"), StoreUnavailable("away"), None]

    async def work() -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    supervisor = make()
    async with asyncio.timeout(10):
        await supervisor.run(work)
    assert supervisor.failed_count == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["the task: failed, starting it again: RecursionError: deep"]


@pytest.mark.anyio
async def test_work_ends_by_cancellation() -> None:
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(make().run(work))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
