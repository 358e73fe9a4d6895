"""The load processes as the runner holds them: start, kill, freeze, hang, end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass, fields
from typing import IO, Final

from dynamo_redis.child import ChildProcess
from faults.history import Recorder
from faults.roles.base import Orders

END_GRACE_S: Final = 5.0


@dataclass(slots=True)
class LoadProcess:
    """One load process. Each action of the runner on it is written into the runner's history."""

    orders: Orders
    recorder: Recorder
    child: ChildProcess
    frozen: bool = False

    @classmethod
    def start(cls, orders: Orders, recorder: Recorder) -> LoadProcess:
        """Start it; its log goes beside its history."""
        words = [
            word
            for field in fields(Orders)
            if field.name != "role"
            for word in (f"--{field.name.replace('_', '-')}", str(getattr(orders, field.name)))
        ]
        log: IO[bytes]
        with (orders.directory / f"{orders.process}.log").open("ab") as log:
            child = ChildProcess.start(
                [sys.executable, "-m", "faults.load", orders.role, *words],
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            )
        return cls(orders, recorder, child)

    @property
    def name(self) -> str:
        """Its name in the history."""
        return self.orders.process

    @property
    def alive(self) -> bool:
        """True if it runs (frozen or not)."""
        return self.child.returncode is None

    def rest(self) -> None:
        """Tell it to make no new changes."""
        self.child.send_signal(signal.SIGUSR1)

    async def kill(self) -> None:
        """Kill it (kill -9)."""
        self.recorder.note("killed", process=self.name, how="SIGKILL")
        self.child.kill()
        await self.child.wait()

    def freeze(self) -> None:
        """Stop it (SIGSTOP)."""
        self.recorder.note("frozen", process=self.name)
        self.frozen = True
        self.child.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on (SIGCONT)."""
        if self.frozen and self.alive:
            self.frozen = False
            self.child.send_signal(signal.SIGCONT)
            self.recorder.note("thawed", process=self.name)

    def hang(self) -> None:
        """Block its event loop beyond two TTLs."""
        self.recorder.note("hung", process=self.name)
        self.child.send_signal(signal.SIGUSR2)

    async def end(self) -> None:
        """Send SIGTERM, then SIGKILL. Safe to be cancelled."""
        self.thaw()
        await self.child.stop(END_GRACE_S)


async def end_all(processes: list[LoadProcess]) -> None:
    """End them all at once."""
    await asyncio.gather(*(process.end() for process in processes))
