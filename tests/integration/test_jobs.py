"""Jobs in a separate process: answers, limits, deaths, and the end with the parent."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from dynamo_redis.jobs.lane import FirstJobRefused, JobDied, JobOverrun, Lane, NoProcess, QueueFull
from tests.processes import PROGRAMS, is_alive

JOB_PROCESS = str(PROGRAMS / "job_process.py")

OpenLane = Callable[..., Lane]


@pytest.fixture
async def open_lane() -> AsyncIterator[OpenLane]:
    lanes: list[Lane] = []

    def open_(*arguments: str, **options: Any) -> Lane:
        settings: dict[str, Any] = {"time_s": 1, "idle_s": 60, "queue_count": 64, **options}
        lanes.append(Lane((sys.executable, *(arguments or (JOB_PROCESS,))), **settings))
        return lanes[-1]

    yield open_
    for lane in lanes:
        await lane.aclose()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_answers_come_to_their_jobs(open_lane: OpenLane) -> None:
    lane = open_lane(ahead_count=4)
    texts = [os.urandom(size) for size in (0, 1, 7, 1 << 16, 3 << 20)] * 3
    answers = await asyncio.gather(*(lane.run(b"echo ", text) for text in texts))
    assert [bytes(answer) for answer in answers] == texts


async def test_overrun_costs_its_own_job_alone(open_lane: OpenLane) -> None:
    lane = open_lane(ahead_count=4)
    first = int(await lane.run(b"pid"))
    spinning = asyncio.create_task(lane.run(b"spin"))
    later = [asyncio.create_task(lane.run(b"echo %d" % number)) for number in range(6)]
    with pytest.raises(JobOverrun):
        await spinning
    assert [bytes(await task) for task in later] == [b"%d" % number for number in range(6)]
    assert int(await lane.run(b"pid")) != first
    assert not psutil.pid_exists(first)


@pytest.mark.parametrize("job", [b"hoard", b"die"])
async def test_death_costs_its_own_job_alone(open_lane: OpenLane, job: bytes) -> None:
    lane = open_lane(ahead_count=2)
    dying, living = asyncio.create_task(lane.run(job)), asyncio.create_task(lane.run(b"echo still"))
    with pytest.raises(JobDied):
        await dying
    assert await living == b"still"


async def test_killed_process_is_replaced(open_lane: OpenLane, tmp_path: Any) -> None:
    lane = open_lane()
    await lane.run(b"echo x")
    waiting = asyncio.create_task(lane.run(b"wait ", os.fsencode(tmp_path / "never")))
    await asyncio.sleep(0)
    assert lane.pid is not None
    os.kill(lane.pid, signal.SIGKILL)
    with pytest.raises(JobDied):
        await waiting
    assert await lane.run(b"echo y") == b"y"


async def test_stopped_process_is_killed_at_last(open_lane: OpenLane) -> None:
    """It uses no processor time, so the time limit must end it."""
    lane = open_lane()
    await lane.run(b"echo x")
    assert lane.pid is not None
    os.kill(lane.pid, signal.SIGSTOP)
    with pytest.raises(JobOverrun):
        await lane.run(b"echo y")
    assert await lane.run(b"echo z") == b"z"


async def test_cancelled_caller_leaves_the_lane_whole(open_lane: OpenLane, tmp_path: Any) -> None:
    lane = open_lane(ahead_count=2)
    path = tmp_path / "go"
    jobs = [lane.run(b"wait ", os.fsencode(path)), lane.run(b"echo a"), lane.run(b"echo b")]
    callers = [asyncio.create_task(job) for job in jobs]
    await asyncio.sleep(0)
    callers[0].cancel()
    callers[1].cancel()
    path.touch()
    assert await callers[2] == b"b"


async def test_cancelled_caller_gives_up_its_place(open_lane: OpenLane, tmp_path: Any) -> None:
    lane = open_lane(queue_count=2)
    path = tmp_path / "go"
    working = asyncio.create_task(lane.run(b"wait ", os.fsencode(path)))
    await asyncio.sleep(0)
    await until(lambda: lane.pid is not None)
    job = bytearray(b"echo x")
    leaving = asyncio.create_task(lane.run(job))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert not [holder for holder in gc.get_referrers(job) if isinstance(holder, tuple)]
    staying = asyncio.create_task(lane.run(b"echo y"))
    path.touch()
    assert await working == b"waited"
    assert await staying == b"y"


async def test_close_while_a_dead_process_is_reaped(open_lane: OpenLane, tmp_path: Any) -> None:
    """The thread that would wait for the process is busy, for example with a name lookup."""
    executor, free = ThreadPoolExecutor(1, "asyncio"), threading.Event()
    asyncio.get_running_loop().set_default_executor(executor)
    lane = open_lane()
    working = asyncio.create_task(lane.run(b"wait ", os.fsencode(tmp_path / "never")))
    await asyncio.sleep(0)
    await until(lambda: lane.pid is not None)
    executor.submit(free.wait)
    pid = lane.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: lane.pid is None)
    closing = asyncio.create_task(lane.aclose())
    await asyncio.sleep(0)
    free.set()
    await closing
    with pytest.raises(JobDied):
        await asyncio.wait_for(working, 30)


async def test_queue_is_bounded(open_lane: OpenLane, tmp_path: Any) -> None:
    lane = open_lane(queue_count=2)
    path = tmp_path / "go"
    callers = [asyncio.create_task(lane.run(b"wait ", os.fsencode(path))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await lane.run(b"echo x")
    path.touch()
    await asyncio.gather(*callers)


async def test_idle_process_ends(open_lane: OpenLane) -> None:
    lane = open_lane(idle_s=0.05)
    pid = int(await lane.run(b"pid"))
    while lane.is_running:
        await asyncio.sleep(0.01)
    assert not psutil.pid_exists(pid)
    assert int(await lane.run(b"pid")) != pid


async def test_first_job_decides(open_lane: OpenLane) -> None:
    def refuse(answer: bytearray) -> None:
        raise FirstJobRefused(answer.decode())

    with pytest.raises(FirstJobRefused, match="first"):
        await open_lane(first_job=b"any", check_first=refuse).run(b"echo x")
    with pytest.raises(JobDied):
        await open_lane(first_job=b"die").run(b"echo x")
    assert await open_lane(first_job=b"any").run(b"echo x") == b"x"


async def test_program_that_is_not_there_is_said() -> None:
    lane = Lane(("/nowhere/python",), time_s=1, idle_s=1, queue_count=1)
    with pytest.raises(NoProcess, match="No such file"):
        await lane.run(b"x")
    await lane.aclose()


async def test_unexpected_answer_ends_the_process(open_lane: OpenLane) -> None:
    lane = open_lane("-c", "import os, time; os.write(1, bytes([255]) * 4096); time.sleep(600)")
    with pytest.raises(JobDied):
        await lane.run(b"x")


def test_process_does_not_outlive_its_parent(tmp_path: Any) -> None:
    """The parent is killed: an idle process ends at once, one that works or sleeps at its limit."""
    owner = str(PROGRAMS / "lane_owner.py")
    parent = subprocess.Popen([sys.executable, owner, JOB_PROCESS], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(is_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_process_gets_no_secret_of_the_environment(
    open_lane: OpenLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DYN_REDIS_URL", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "s3cret")
    names = bytes(await open_lane().run(b"environment")).decode()
    assert "'PATH'" in names
    assert "DYN_REDIS_URL" not in names
    assert "OPENAI_API_KEY" not in names
