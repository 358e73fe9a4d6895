from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dynamo_redis.cli import deployment as module
from dynamo_redis.cli.children import ServiceCommand, ServiceProcess
from dynamo_redis.cli.deployment import Deployment
from dynamo_redis.cli.failures import CommandFailed

SERVES = "print('ready http://127.0.0.1:1', flush=True); signal.pause()"
FAILS = "print('dynamo-redis: port 8000 is in use', file=sys.stderr); sys.exit(2)"


@dataclass(frozen=True, slots=True)
class Script(ServiceCommand):
    """A service of a few lines of Python."""

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-S", "-c", f"import os, signal, sys, time; {self.arguments[0]}"]


class Notes:
    """The notices and log lines of a deployment."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.logs: list[tuple[str, str]] = []

    def log(self, service: str, line: str) -> None:
        self.logs.append((service, line))

    async def until(self, condition: Callable[[Notes], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition(self):
                await asyncio.sleep(0.005)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@asynccontextmanager
async def run(
    notes: Notes, frontend: str, workers: Sequence[str] = (), *, grace_s: float = 5.0
) -> AsyncIterator[Deployment]:
    deployment = Deployment(
        server=None,
        frontend=Script("frontend", (frontend,)),
        workers=[Script(f"worker-{n}", (code,)) for n, code in enumerate(workers, 1)],
        env=dict(os.environ),
        grace_s=grace_s,
        notice=notes.notices.append,
        log=notes.log,
    )
    try:
        yield deployment
    finally:
        await deployment.stop()


def writes_its_pid(path: Path, then: str = SERVES) -> str:
    """Return a service that writes its process id to a file. The file is whole or absent at any time."""
    whole = f"open({str(path)!r} + '.new', 'w').write(str(os.getpid()))"
    return f"{whole}; os.replace({str(path)!r} + '.new', {str(path)!r}); {then}"


def is_alive(path: Path) -> bool:
    try:
        os.kill(int(path.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


async def test_it_is_up_when_every_service_says_so(notes: Notes) -> None:
    worker = SERVES.replace("http://127.0.0.1:1", "my model at dynamo.backend.generate, instance 7f")
    async with run(notes, SERVES, [worker]) as deployment:
        await deployment.start()
        assert deployment.url == "http://127.0.0.1:1"
        assert deployment.models == ["my model"]


@pytest.mark.parametrize("failing", ["frontend", "worker-1"])
async def test_start_fails_with_error_of_failed_service(failing: str, notes: Notes, tmp_path: Path) -> None:
    other = writes_its_pid(tmp_path / "other")
    codes = (FAILS, other) if failing == "frontend" else (other, FAILS)
    async with run(notes, codes[0], codes[1:]) as deployment:
        with pytest.raises(CommandFailed, match=rf"^{failing}: port 8000 is in use$"):
            await deployment.start()
    assert not (tmp_path / "other").exists() or not is_alive(tmp_path / "other")
    assert notes.logs == [], "the error is printed once"


async def test_start_fails_if_a_service_is_never_ready(notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "START_TIMEOUT_S", 0.5)
    slow = "print('still loading', file=sys.stderr, flush=True); signal.pause()"
    async with run(notes, SERVES, [slow]) as deployment:
        with pytest.raises(CommandFailed, match=r"^worker-1 was not ready within 0\.5 s: still loading$"):
            await deployment.start()


async def test_dead_service_is_restarted(
    notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE_FIRST_S", 0.01)
    pid_file = tmp_path / "worker"
    async with run(notes, SERVES, [writes_its_pid(pid_file)]) as deployment:
        await deployment.start()
        first = int(pid_file.read_text())
        os.kill(first, signal.SIGKILL)
        await notes.until(lambda _: pid_file.read_text() != str(first))
        assert notes.notices == ["worker-1 was killed by SIGKILL; starting it again"]
    assert not is_alive(pid_file)


async def test_restarts_have_growing_pauses(
    notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE_FIRST_S", 0.05)
    once = f"os.path.exists({str(tmp_path / 'ran')!r}) and sys.exit(3); open({str(tmp_path / 'ran')!r}, 'w')"
    code = f"{once}; print('ready m at e', flush=True); time.sleep(0.05)"
    async with run(notes, SERVES, [code]) as deployment:
        await deployment.start()
        started = time.monotonic()
        await notes.until(lambda notes: len(notes.notices) == 4)
    assert time.monotonic() - started > 0.05 + 0.1 + 0.2
    assert "ended with exit code 3 (it logged nothing)" in notes.notices[-1]


async def test_a_service_that_does_not_end_is_killed_after_its_grace(notes: Notes, tmp_path: Path) -> None:
    stubborn = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {writes_its_pid(tmp_path / 'pid')}"
    async with run(notes, stubborn, grace_s=0.3) as deployment:
        await deployment.start()
        started = time.monotonic()
    assert 0.3 <= time.monotonic() - started < 8
    assert not is_alive(tmp_path / "pid")


async def test_kill_does_not_wait_for_the_grace(notes: Notes) -> None:
    async with run(
        notes, f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {SERVES}", grace_s=30
    ) as deployment:
        await deployment.start()
        asyncio.get_running_loop().call_later(0.05, deployment.kill)
        started = time.monotonic()
    assert time.monotonic() - started < 15


async def test_logs_are_passed_on_line_by_line_and_long_ones_in_pieces(notes: Notes) -> None:
    talk = "sys.stderr.write('one\\ntwo\\n' + 'x' * 100_000 + '\\nlast without end'); sys.stderr.flush()"
    async with run(
        notes, SERVES, [f"{talk}; print('ready m at e', flush=True); os.close(2); signal.pause()"]
    ) as up:
        await up.start()
        await notes.until(lambda notes: ("worker-1", "last without end") in notes.logs)
    lines = [line for _, line in notes.logs]
    assert lines[:2] == ["one", "two"]
    assert "".join(lines[2:-1]) == "x" * 100_000
    assert max(map(len, lines)) <= 64 << 10


async def test_last_words_prefer_error_to_later_log_lines(notes: Notes) -> None:
    code = "sys.stderr.write('dynamo-redis: no model\\nbye\\n'); sys.exit(1)"
    process = await ServiceProcess.start(Script("s", (code,)), dict(os.environ), notes.log)
    assert await process.ended() == 1
    assert process.last_words() == "no model"
    await process.stop(0)
