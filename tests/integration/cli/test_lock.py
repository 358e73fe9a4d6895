"""`dynamo-redis lock`, as a process, against a real server."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from dynamo_redis.store.base import Lock
from dynamo_redis.store.locks.redis_locks import RedisLocks
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer
from tests.processes import PROGRAMS

WAIT_S = 30.0

Locked = Callable[..., Awaitable[Process]]


@pytest.fixture
async def lock(own_redis_server: EmbeddedServer) -> AsyncIterator[Lock]:
    """Yield the lock that the commands name."""
    locks = RedisLocks(RedisClient(own_redis_server.url, timeout_s=3.0), "dynamo")
    yield locks.lock("nightly")
    await locks.aclose()


@pytest.fixture
async def locked(own_redis_server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[Locked]:
    """Start `dynamo-redis lock … nightly -- sh -c SCRIPT`."""
    started: list[Process] = []

    async def start(script: str, *options: str) -> Process:
        argv = ("-m", "dynamo_redis", "lock", "--redis-url", own_redis_server.url, *options, "nightly")
        process = await asyncio.create_subprocess_exec(
            sys.executable, *argv, *("--", "sh", "-c", script), stdout=PIPE, stderr=PIPE, cwd=tmp_path
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def first_line(process: Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(WAIT_S):
        return (await process.stdout.readline()).decode().strip()


async def end_of(process: Process) -> tuple[int | None, str, str]:
    """Wait for the end. Return exit code, standard output and standard error."""
    async with asyncio.timeout(WAIT_S):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_a_command_runs_under_the_lock_and_its_exit_code_is_ours(locked: Locked, lock: Lock) -> None:
    process = await locked("echo $DYN_LOCK_TOKEN; sleep 0.3; exit 3")
    token = await first_line(process)
    holder = await lock.holder()
    assert holder is not None
    assert token == str(holder.fencing_token)
    assert await end_of(process) == (3, "", "")
    assert await lock.holder() is None


async def test_failed_try_names_the_holder(locked: Locked, lock: Lock) -> None:
    async with lock.hold():
        code, out, err = await end_of(await locked("echo ran", "--timeout", "0"))
    assert (code, out) == (1, "")
    assert err.startswith("dynamo-redis: lock nightly is held by ")


async def test_a_command_is_killed_when_its_lock_is_lost(
    locked: Locked, own_redis_server: EmbeddedServer
) -> None:
    process = await locked("trap '' TERM INT; echo up; sleep 60; echo never", "--ttl", "1")
    assert await first_line(process) == "up"
    own_redis_server.send_signal(signal.SIGSTOP)
    code, out, err = await end_of(process)
    own_redis_server.send_signal(signal.SIGCONT)
    assert (code, out) == (1, "")
    assert "dynamo-redis: lock nightly is lost: not renewed within 90% of its TTL of 1 s" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_command_in_peace_and_frees_the_lock(
    locked: Locked, lock: Lock, number: signal.Signals
) -> None:
    process = await locked("trap 'echo bye; exit 7' TERM INT; echo up; while :; do sleep 0.02; done")
    assert await first_line(process) == "up"
    process.send_signal(number)
    code, out, _ = await end_of(process)
    assert (code, out) == (7 if number == signal.SIGTERM else 130, "bye\n")
    assert await lock.holder() is None


SIGNALLED_AT_START = PROGRAMS / "signalled_at_start.py"


async def test_signal_that_comes_as_the_command_starts_is_passed_on(
    own_redis_server: EmbeddedServer, lock: Lock
) -> None:
    argv = ("lock", "--redis-url", own_redis_server.url, "nightly", "--", "sleep", "60")
    process = await asyncio.create_subprocess_exec(
        sys.executable, SIGNALLED_AT_START, *argv, stdout=PIPE, stderr=PIPE
    )
    assert await end_of(process) == (128 + signal.SIGTERM, "", "")
    assert await lock.holder() is None
