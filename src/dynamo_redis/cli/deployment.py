"""The processes of `dynamo-redis up` (Redis, a frontend, workers): start, restart and stop.

| task | started by | ends |
|---|---|---|
| one task for each service, which restarts it (`_keep`) | `start` | cancelled by `stop` |
| one task for the embedded server, which restarts it (`_keep_server`) | `start` | cancelled by `stop` |

If a service ends before the deployment is up, `start` fails with the service's own error, and everything is
stopped. A service that ends later is started again after a pause. The pause doubles from 0.5 s to 10 s; it is
0.5 s again after the service has run for 30 s.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dynamo_redis.cli.children import LineSink, ServiceCommand, ServiceProcess
from dynamo_redis.cli.failures import CommandFailed
from dynamo_redis.store.server import EmbeddedServer

START_TIMEOUT_S = 30.0
SERVER_GRACE_S = 1.0
_PAUSE_FIRST_S, _PAUSE_LAST_S = 0.5, 10.0
_STABLE_AFTER_S = 30.0
_SERVER_LOOK_S = 0.25


@dataclass(slots=True)
class Deployment:
    """The processes of one `up`. Call `start`, then `stop`, from one event loop.

    `env` is the environment of services that are started from now on. At `stop` the services have `grace_s`
    to finish their requests and to leave the registry. `notice` is called with a line for the user when a
    process has ended and is started again; `log`, with each line that a service logs.
    """

    server: EmbeddedServer | None
    frontend: ServiceCommand
    workers: Sequence[ServiceCommand]
    env: dict[str, str] = field(repr=False)
    grace_s: float
    notice: Callable[[str], None]
    log: LineSink
    url: str = ""
    """The frontend's URL, from its ready line."""
    models: Sequence[str] = ()
    """The model of each worker."""
    _running: dict[str, ServiceProcess] = field(default_factory=dict)
    _keepers: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        """Start everything, and wait until each service is ready.

        Raises CommandFailed with the error of the first service that ended, or that was not ready within
        30 s; StoreUnavailable if the embedded server does not start. Call `stop` in any case.
        """
        if self.server is not None:
            await self.server.start()
        services = (self.frontend, *self.workers)
        processes = [await self._launch(service) for service in services]
        waits = [asyncio.create_task(_wait_until_ready(process)) for process in processes]
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self.url, *lines = await asyncio.gather(*waits)
            self.models = [line.rpartition(" at ")[0] for line in lines]
        except TimeoutError:
            late = next(process for process in processes if not process.is_ready)
            raise CommandFailed(
                f"{late.service.name} was not ready within {START_TIMEOUT_S:g} s: {late.last_words()}"
            ) from None
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        self._keepers = [asyncio.create_task(self._keep(process)) for process in processes]
        if self.server is not None:
            self._keepers.append(asyncio.create_task(self._keep_server(self.server)))

    async def stop(self) -> None:
        """Stop the frontend and the workers, then the embedded server, within `grace_s` + 1 s. Idempotent."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._keepers.clear()
        await asyncio.gather(*(process.stop(self.grace_s) for process in self._running.values()))
        self._running.clear()
        if self.server is not None:
            await self.server.stop(SERVER_GRACE_S)

    def kill(self) -> None:
        """Kill every service. Call `stop` afterwards: it waits for their ends."""
        for process in self._running.values():
            process.kill()

    @property
    def running_workers_count(self) -> int:
        """The number of workers that run and are ready."""
        processes = (self._running.get(service.name) for service in self.workers)
        return sum(process is not None and process.is_ready for process in processes)

    def last_words(self, name: str) -> str:
        """Return the error or the last log line of a service."""
        process = self._running.get(name)
        return process.last_words() if process is not None else "it does not run"

    async def _launch(self, service: ServiceCommand) -> ServiceProcess:
        process = await ServiceProcess.start(service, self.env, self.log)
        self._running[service.name] = process
        return process

    async def _keep(self, process: ServiceProcess) -> None:
        """Start a service again each time it ends."""
        service = process.service
        pause_s = _PAUSE_FIRST_S
        while True:
            started_s = time.monotonic()
            code = await process.ended()
            self._running.pop(service.name, None)
            if time.monotonic() - started_s > _STABLE_AFTER_S:
                pause_s = _PAUSE_FIRST_S
            end = f"ended with exit code {code} ({process.last_words()})"
            if code < 0:
                end = f"was killed by {signal.Signals(-code).name}"
            self.notice(f"{service.name} {end}; starting it again")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _PAUSE_LAST_S)
            process = await self._launch(service)

    async def _keep_server(self, server: EmbeddedServer) -> None:
        """Start the embedded server again, with its data, each time it ends."""
        pause_s = _PAUSE_FIRST_S
        while True:
            await asyncio.sleep(_SERVER_LOOK_S)
            if server.pid is not None:
                continue
            self.notice("redis ended; starting it again with its data")
            try:
                await server.start()
                pause_s = _PAUSE_FIRST_S
            except Exception as exc:  # noqa: BLE001 - printed, and tried again
                self.notice(f"redis does not start: {exc}")
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _PAUSE_LAST_S)


async def _wait_until_ready(process: ServiceProcess) -> str:
    """Wait until a service is ready. Raises CommandFailed if it ends before."""
    ready, ended = asyncio.create_task(process.ready()), asyncio.create_task(process.ended())
    try:
        await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            return ready.result()
        raise CommandFailed(f"{process.service.name}: {process.last_words()}")
    finally:
        ready.cancel()
        ended.cancel()
        await asyncio.gather(ready, ended, return_exceptions=True)
