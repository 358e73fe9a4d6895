"""The system port of several frontend processes on one HTTP port: one answer for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from dynamo_redis.cli.frontend_processes import FrontendProcesses
from dynamo_redis.config import SystemSettings
from dynamo_redis.frontend.http.siblings import all_metrics
from dynamo_redis.runtime.system.server import SystemServer


@asynccontextmanager
async def serve_system_port(
    settings: SystemSettings, processes: FrontendProcesses, directory: Path
) -> AsyncIterator[None]:
    """Serve `/health`, `/live` and `/metrics` of all processes while the block runs.

    `directory` has the processes' sockets. Raises ConfigError if it cannot listen.
    """
    server = _Server(settings, processes, directory)
    try:
        yield
    finally:
        await server.aclose()


class _Server(SystemServer):
    def __init__(self, settings: SystemSettings, processes: FrontendProcesses, directory: Path) -> None:
        self._processes = processes
        self._directory = directory
        super().__init__(settings, loop_stall_s=0.0)

    def health(self) -> tuple[int, dict[str, Any]]:
        """Return the health of all processes together."""
        return self._processes.health()

    def metrics(self) -> bytes:
        """Return the metrics of the processes."""
        return asyncio.run(all_metrics(self._directory)).encode()
