"""Child processes end completely, whether parent or child ends first."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest

from dynamo_redis.child import ChildProcess
from tests.processes import PROGRAMS, command_line

FAMILY = PROGRAMS / "family.py"


@asynccontextmanager
async def family(directory: Path, *arguments: str) -> AsyncIterator[ChildProcess]:
    """Start `FAMILY`, with a grandchild in its group."""
    out = directory / "family.out"
    with out.open("wb") as file:
        child = ChildProcess.start([sys.executable, FAMILY, *arguments], stdout=file)
    try:
        await until(lambda: "ready" in out.read_text())
        yield child
    finally:
        await child.stop(0.1)


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    with anyio.fail_after(timeout_s):
        while not condition():
            await anyio.sleep(0.01)


def group(pgid: int) -> list[int]:
    """Return the processes of a group that still run."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == pgid and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


async def test_exit_codes_and_output(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        child = ChildProcess.start(
            ["sh", "-c", "echo $NAME; pwd; cat; exit 3"], env={"NAME": "a b"}, cwd=tmp_path, stdout=out
        )
    assert await child.wait(5) == 3
    assert child.returncode == 3
    assert (tmp_path / "out").read_text() == f"a b\n{tmp_path}\n"  # and `cat` had nothing to read
    assert await child.stop() == 3
    assert "ended with 3" in repr(child)


async def test_a_program_that_is_not_there() -> None:
    child = ChildProcess.start(["no-such-program"], stderr=subprocess.DEVNULL)
    assert await child.wait(5) in (126, 127)  # 126 where a directory of PATH may not be read


async def test_arguments_are_not_expanded(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        child = ChildProcess.start(["printf", "%s\n", "$HOME", "a  b", "'", "*", ""], stdout=out)
    assert await child.wait(5) == 0
    assert (tmp_path / "out").read_text() == "$HOME\na  b\n'\n*\n\n"


async def test_captured_output_ends_with_the_program() -> None:
    """The watchdog must not hold the pipe open."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as output:
        with os.fdopen(writing, "wb") as file:
            child = ChildProcess.start(["echo", "hello"], stdout=file)
        text = await asyncio.wait_for(asyncio.to_thread(output.read), 30)
    assert text == b"hello\n"
    assert await child.wait(5) == 0


async def test_stop_ends_the_whole_group_and_leaves_no_zombie(tmp_path: Path) -> None:
    async with family(tmp_path) as child:
        assert len(group(child.pid)) == 3  # the program, what it started, the watchdog
        assert await child.stop() == -signal.SIGTERM
        await until(lambda: group(child.pid) == [])
        assert not psutil.pid_exists(child.pid)
        assert await child.stop() == -signal.SIGTERM  # idempotent


async def test_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    async with family(tmp_path, "stubborn") as child:
        started = time.monotonic()
        assert await child.stop(grace_s=0.3) == -signal.SIGKILL
        assert 0.3 <= time.monotonic() - started < 8
        await until(lambda: group(child.pid) == [])


async def test_the_grandchildren_of_a_program_that_crashed_are_killed(tmp_path: Path) -> None:
    async with family(tmp_path) as child:
        os.kill(child.pid, signal.SIGKILL)
        assert await child.wait(5) == -signal.SIGKILL
        await until(lambda: group(child.pid) == [])


async def test_a_cancelled_stop_kills(tmp_path: Path) -> None:
    async with family(tmp_path, "stubborn") as child:
        with anyio.move_on_after(0.1):
            await child.stop(grace_s=60)
        assert child.returncode == -signal.SIGKILL
        await until(lambda: group(child.pid) == [])


async def test_wait_times_out_and_leaves_the_child_running(tmp_path: Path) -> None:
    async with family(tmp_path) as child:
        with pytest.raises(TimeoutError, match=r"still runs after 0\.05 s"):
            await child.wait(0.05)
        assert child.returncode is None


async def test_a_signal_to_the_parents_group_does_not_reach_it(tmp_path: Path) -> None:
    """Ctrl-C reaches the terminal's foreground group, so only the parent, which stops its children in
    order."""
    async with family(tmp_path) as child:
        assert os.getpgid(child.pid) == child.pid
        assert os.getsid(child.pid) == child.pid != os.getsid(0)


async def test_a_signal_to_its_group_does_not_disarm_the_watchdog(tmp_path: Path) -> None:
    async with family(tmp_path, "stubborn") as child:
        (watchdog,) = [pid for pid in group(child.pid) if "/bin/sh" in command_line(psutil.Process(pid))]
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            os.kill(watchdog, number)
        await anyio.sleep(0.05)
        assert watchdog in group(child.pid)


PARENT = PROGRAMS / "family_parent.py"


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.3])
async def test_no_process_is_left_after_kill_9_of_the_parent(tmp_path: Path, after_s: float) -> None:
    out = tmp_path / "pids"
    with out.open("wb") as file:
        parent = ChildProcess.start([sys.executable, PARENT, FAMILY], stdout=file)
    try:
        await until(lambda: out.read_text().count("\n") >= 1)
        children = [int(pid) for pid in out.read_text().splitlines()[0].split()]
        await anyio.sleep(after_s)
        parent.send_signal(signal.SIGKILL)
        assert await parent.wait(5) == -signal.SIGKILL
        for child in children:
            await until(lambda child=child: group(child) == [])  # type: ignore[misc]
    finally:
        await parent.stop()


async def test_descriptors_are_returned(tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    for _ in range(5):
        await ChildProcess.start(["true"]).wait(5)
    assert psutil.Process().num_fds() == before
