"""`dynamo-redis frontend`: the OpenAI-compatible HTTP server."""

from __future__ import annotations

import asyncio
import logging
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dynamo_redis.cli.failures import require_extra
from dynamo_redis.cli.options import SettingsCommand, given_settings, load, setting_options
from dynamo_redis.cli.service import announce_ready, run_service, runtime_options
from dynamo_redis.config import (
    GROUPS,
    FrontendSettings,
    PlaneSettings,
    RouterSettings,
    RuntimeSettings,
    StoreSettings,
    SystemSettings,
    child_environment,
    env_name,
    unknown_settings,
)

if TYPE_CHECKING:
    from dynamo_redis.runtime.runtime import DistributedRuntime

log = logging.getLogger(__name__)

_LONGEST_PATH = 60

GRPC_OPTION = "--grpc-port (DYN_GRPC_PORT)"


@click.command("frontend", cls=SettingsCommand)
@click.option("--listener-fd", "listener_fd", type=int, hidden=True)
@click.option("--siblings", type=click.Path(path_type=Path), hidden=True)
@setting_options(FrontendSettings)
@setting_options(RouterSettings)
@runtime_options
def frontend(listener_fd: int | None, siblings: Path | None, **options: str | None) -> int:
    """Serve the OpenAI API for all models in the registry: chat and text completions, /v1/models, /health.

    It needs no model files: it fetches the tokenizer and template of each model from Redis. Any number of
    frontends may run. At SIGTERM or Ctrl-C, requests under way finish first.

    One process uses one core. With --frontend-processes N, N processes serve one port. One that dies is
    started again. SIGHUP replaces them one after another, without losing a request: for a new release, or
    changed settings in `.env`.

    \b
    Examples:
      dynamo-redis frontend
      dynamo-redis frontend --redis-url redis://10.0.0.5:6379 --http-port 8000
      DYN_REDIS_URL=redis://10.0.0.5 dynamo-redis frontend --router-mode least_loaded
      dynamo-redis frontend --router-mode kv
      dynamo-redis frontend --router-mode kv --router-endpoint dynamo.router.generate
      dynamo-redis frontend --frontend-processes 4
    """
    settings = load(FrontendSettings, options)
    router_settings = load(RouterSettings, options)
    load(PlaneSettings, options).require_one_plane()
    if settings.kserve_grpc_server:
        require_extra("kserve")
    listener: socket.socket | None = None
    if listener_fd is not None and siblings is not None:
        from dynamo_redis.cli.frontend_processes import end_with_parent

        end_with_parent(siblings, load(RuntimeSettings, options).drain_s)
        listener = socket.socket(fileno=listener_fd)
        listener.set_inheritable(False)
        listener.setblocking(False)
    elif settings.frontend_processes_count > 1:
        return _run_processes(settings, options)

    async def serve(runtime: DistributedRuntime) -> None:
        from dynamo_redis.frontend.http.server import serve_frontend

        leaving = asyncio.create_task(_announce_drain(runtime)) if listener is not None else None
        try:
            await serve_frontend(
                runtime,
                settings,
                router_settings,
                on_ready=announce_ready,
                listener=listener,
                siblings=siblings,
            )
        finally:
            if leaving is not None:
                leaving.cancel()
                await asyncio.gather(leaving, return_exceptions=True)

    run_service("frontend", options, serve)
    return 0


def _run_processes(settings: FrontendSettings, options: Mapping[str, str | None]) -> int:
    """Run several frontend processes. Return the exit code."""
    from dynamo_redis.cli.frontend_processes import FrontendProcesses
    from dynamo_redis.frontend.http.door import Door
    from dynamo_redis.frontend.http.port import SharedPort
    from dynamo_redis.runtime.logging import configure_dynamo_logging

    require_extra("http")
    runtime, system = load(RuntimeSettings, options), load(SystemSettings, options)
    configure_dynamo_logging(service_name="frontend", settings=runtime)
    for sentence in unknown_settings().values():
        log.warning("%s", sentence)
    port = SharedPort(settings.http_host, settings.http_port, scheme=Door(settings).scheme)
    environment = _environment(options)
    grpc_port: SharedPort | None = None
    if settings.kserve_grpc_server:
        grpc_port = SharedPort(settings.http_host, settings.grpc_port, GRPC_OPTION)
        grpc_port.open().close()  # each process has a socket of grpcio's own
        environment[env_name(FrontendSettings.model_fields["grpc_port"])] = str(grpc_port.number)

    async def main(siblings: Path) -> int:
        count = settings.frontend_processes_count
        processes = FrontendProcesses(
            port, count, siblings, environment, runtime.drain_s, load(StoreSettings, options).loop_stall_s
        )
        if system.system_port < 0:
            return await processes.run(announce_ready)
        from dynamo_redis.cli.frontend_health import serve_system_port

        async with serve_system_port(system, processes, siblings):
            return await processes.run(announce_ready)

    # The path of a unix socket has some 100 bytes at most, and directories for temporary files may be deep.
    short = None if len(tempfile.gettempdir()) <= _LONGEST_PATH else "/tmp"  # noqa: S108
    with tempfile.TemporaryDirectory(
        prefix="dynamo-redis-", dir=short, ignore_cleanup_errors=True
    ) as directory:
        try:
            return asyncio.run(main(Path(directory)))
        finally:
            if grpc_port is not None:
                grpc_port.close()


def _environment(options: Mapping[str, str | None]) -> dict[str, str]:
    """Return the frontend processes' environment: the options, without variables that were reported."""
    values = {name: value for group in GROUPS for name, value in given_settings(group, options)}
    values[env_name(SystemSettings.model_fields["system_port"])] = "-1"  # one port cannot be that of several
    unknown = unknown_settings()
    environment = child_environment(values)
    return {name: value for name, value in environment.items() if name.upper() not in unknown}


async def _announce_drain(runtime: DistributedRuntime) -> None:
    from dynamo_redis.cli.frontend_processes import announce_drain

    await runtime.wait_for_shutdown()
    announce_drain()
