"""`dynamo-redis up`: everything on this machine, in one command."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from urllib.parse import urlsplit

import click

from dynamo_redis.cli import collection, connect, probe
from dynamo_redis.cli.children import ServiceCommand
from dynamo_redis.cli.data_directory import data_directory
from dynamo_redis.cli.deployment import Deployment
from dynamo_redis.cli.failures import CommandFailed, require_extra
from dynamo_redis.cli.formats import redact
from dynamo_redis.cli.options import SettingsCommand, given_settings, load, setting_options
from dynamo_redis.cli.status import Display, Status, make_display
from dynamo_redis.config import (
    EventSettings,
    FrontendSettings,
    MockEngineSettings,
    ModelSettings,
    PlaneSettings,
    RouterSettings,
    RuntimeSettings,
    SettingsGroup,
    StoreSettings,
    SystemSettings,
    child_environment,
    env_name,
    origins,
    remove_runtime_file,
    running_deployments,
    unknown_settings,
    write_runtime_file,
)
from dynamo_redis.errors import DynamoRedisError
from dynamo_redis.names import INSTANCES
from dynamo_redis.store.server import EmbeddedServer

DRAIN_S = 2.0
"""Time for requests under way after Ctrl-C, unless `--drain` is set: `up` should end within 5 s."""
GRACE_BEYOND_DRAIN_S = 1.5
ROUTER_MODE = "kv"
"""The frontend's router mode, unless `--router-mode` or the environment sets it."""
HTTP_HOST = "127.0.0.1"
"""The frontend's address, unless `--http-host` or the environment sets it: a trial on one machine serves that
machine only."""
SERVING_TIMEOUT_S = 10.0
_LOOK_S = 1.0
_FIRST_LOOK_S = 0.02
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GROUPS: tuple[type[SettingsGroup], ...] = (
    StoreSettings,
    PlaneSettings,
    EventSettings,
    RuntimeSettings,
    FrontendSettings,
    RouterSettings,
    ModelSettings,
    MockEngineSettings,
)


@click.command("up", cls=SettingsCommand)
@click.option(
    "--workers",
    "workers_count",
    type=click.IntRange(0, 64),
    default=2,
    metavar="N",
    help="Number of mock workers.  [default 2]",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Directory of the embedded Redis's data.  [default: a temporary directory]",
)
@setting_options(ModelSettings)
@setting_options(MockEngineSettings)
@setting_options(FrontendSettings, router_mode=ROUTER_MODE, http_host=HTTP_HOST)
@setting_options(RouterSettings)
@setting_options(RuntimeSettings, "namespace", "drain_s", "log")
@setting_options(EventSettings)
@setting_options(PlaneSettings, "request_plane", "auth")
@setting_options(StoreSettings, "redis_url", "prefix", "lease_ttl_s")
def up(workers_count: int, data_dir: Path | None, **options: str | None) -> None:
    """Start a Redis, a frontend and mock workers, each as its own process, and show their state.

    With --redis-url or DYN_REDIS_URL that server is used instead of an embedded one. Ctrl-C stops
    everything within 5 s. A process that dies is started again. While `up` runs, the other commands of this
    user find its Redis without --redis-url.

    \b
    Examples:
      dynamo-redis up
      dynamo-redis up --http-port 8123 --workers 4
      dynamo-redis up --router-mode round_robin
      dynamo-redis up --model-path ./Qwen3-0.6B --model-name Qwen/Qwen3-0.6B
      dynamo-redis up --redis-url redis://10.0.0.5:6379
    """
    require_extra("http")
    for group in _GROUPS:
        load(group, options)  # a wrong setting fails before any process starts
    load(PlaneSettings, options).require_one_plane()  # the frontend's
    external = origins(StoreSettings, _given(options))["redis_url"] != "default"
    if external and data_dir is not None:
        raise click.UsageError(
            "--data-dir is for the embedded Redis, but --redis-url (DYN_REDIS_URL) names another Redis"
        )
    data: AbstractContextManager[Path | None] = nullcontext() if external else data_directory(data_dir)
    with data as directory:
        asyncio.run(_Up(options, workers_count, directory).run())


class _Up:
    """One run of the command. `directory` is that of the embedded Redis's data; None if there is none."""

    def __init__(self, options: Mapping[str, str | None], workers_count: int, directory: Path | None) -> None:
        self._options = options
        self._stopping = asyncio.Event()
        self._display: Display = make_display()
        server = None if directory is None else EmbeddedServer(directory)
        # With an embedded server, the settings must not take the server of another running `up`.
        self._store = load(StoreSettings, options if server is None else {**options, "redis_url": server.url})
        runtime, chosen = load(RuntimeSettings, options), origins(RuntimeSettings, _given(options))
        self._embeds = load(ModelSettings, options).model_type == "embedding"
        self._drain_s = DRAIN_S if chosen["drain_s"] == "default" else runtime.drain_s
        # The status line shows the joins and leaves that the services log at `info`.
        self._log = "warn" if chosen["log"] == "default" else runtime.log
        self._held_lines: list[tuple[str, str]] | None = None if self._log == "debug" else []
        self._deployment = Deployment(
            server=server,
            frontend=ServiceCommand("frontend", ("frontend",)),
            workers=[ServiceCommand(f"worker-{n}", ("worker", "mock")) for n in range(1, workers_count + 1)],
            env=self._environment(),
            grace_s=self._drain_s + GRACE_BEYOND_DRAIN_S,
            notice=self._display.notice,
            log=self._on_log,
        )

    async def run(self) -> None:
        """Start everything, show its state, and stop at Ctrl-C, SIGTERM, or the terminal's end (SIGHUP).

        Raises the errors of `Deployment.start`; then everything is stopped.
        """

        def stop() -> None:
            if self._stopping.is_set():
                self._deployment.kill()  # the second signal: do not wait for requests under way
                return
            self._stopping.set()
            self._display.notice("Stopping.")

        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, stop)
        work = asyncio.create_task(self._work())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, stopping):
                task.cancel()
            await asyncio.gather(work, stopping, return_exceptions=True)
            self._display.close()
            await self._deployment.stop()
            remove_runtime_file()
            for number in _STOP_SIGNALS:
                loop.remove_signal_handler(number)

    def _on_log(self, service: str, line: str) -> None:
        """Show a service's line.

        Before the deployment is up, hold it back: a failure then prints one line.
        """
        if self._held_lines is None:
            self._display.log(service, line)
        else:
            self._held_lines.append((service, line))

    async def _work(self) -> None:
        """Start the deployment, announce it, and show its status until cancelled."""
        await self._note_neighbours()
        await self._deployment.start()
        url = self._deployment.url
        # A restarted frontend has the same port, also if port 0 chose it.
        self._deployment.env[env_name(FrontendSettings.model_fields["http_port"])] = str(urlsplit(url).port)
        write_runtime_file(redis_url=self._store.require_url(), prefix=self._store.prefix, http_url=url)
        status = await self._wait_until_serving(url)
        collection.resume()
        held, self._held_lines = self._held_lines or [], None
        for service, line in held:
            self._display.log(service, line)
        notice, store = self._display.notice, self._store
        embedded = "an embedded Redis" if self._deployment.server is not None else "Redis"
        notice(f"dynamo-redis is up at {url}")
        notice(f"  {embedded} at {redact(store.require_url())}, prefix {store.prefix}")
        if self._deployment.models:
            notice("Try it:")
            notice(f"  {curl_line(url, self._deployment.models[0], embeds=self._embeds)}")
        else:
            notice("No worker runs. Start one beside it: dynamo-redis worker mock")
        notice("Ctrl-C stops everything.")
        while True:
            self._display.status(status)
            await asyncio.sleep(_LOOK_S)
            status = await self._look(url)

    async def _note_neighbours(self) -> None:
        """Print variables without effect, and the processes that this deployment runs beside.

        They are other running `up`s, which commands no longer find, and processes that are registered
        already: the frontend sends them requests, too.
        """
        for sentence in unknown_settings().values():
            self._display.notice(sentence)
        urls = [deployment.get("http_url", "?") for deployment in running_deployments()]
        if urls:
            self._display.notice(
                f"Another `up` of yours runs, at {', '.join(urls)}. While this one runs, commands without "
                "--redis-url (DYN_REDIS_URL) use this one."
            )
        if self._deployment.server is not None:
            return
        try:
            async with connect.open_registry(self._options) as registry:
                found = await registry.get_prefix(INSTANCES)
        except DynamoRedisError:
            return  # the services will report it
        count = len({record.key.rpartition("/")[2] for record in found.records})
        if count:
            self._display.notice(
                f"{count} process{'es are' if count > 1 else ' is'} registered already under the prefix "
                f"{self._store.prefix}: this deployment joins them. --redis-prefix (DYN_REDIS_PREFIX) keeps "
                "them apart; `dynamo-redis instances` lists them."
            )

    async def _wait_until_serving(self, url: str) -> Status:
        """Wait until the frontend serves the workers' model. Raises CommandFailed after 10 s."""
        deadline_s = time.monotonic() + SERVING_TIMEOUT_S
        while True:
            status = await self._look(url)
            if status.serving and status.instances_count >= len(self._deployment.workers):
                return status
            if not self._deployment.workers and status.answering:
                return status
            if time.monotonic() > deadline_s:
                raise CommandFailed(
                    f"the frontend does not serve the workers' model within {SERVING_TIMEOUT_S:g} s: "
                    f"{self._deployment.last_words('frontend')}"
                )
            await asyncio.sleep(_FIRST_LOOK_S)

    async def _look(self, url: str) -> Status:
        """Read the state from the frontend's `/health`."""
        health = await probe.get(url, "/health")
        body = health.body if health is not None and isinstance(health.body, dict) else {}
        return Status(
            answering=health is not None,
            serving=health is not None and health.status == 200,
            redis_away=body.get("registry") == "unreachable",
            workers_count=len(self._deployment.workers),
            running_count=self._deployment.running_workers_count,
            instances_count=len(body.get("instances", ())),
            models=tuple(str(model["name"]) for model in body.get("models", ())),
            hit_percent=None if body.get("hit_rate") is None else round(100 * body["hit_rate"]),
        )

    def _environment(self) -> dict[str, str]:
        """Return the services' environment: the options of `up`, and the registry's address."""
        values = {name: value for group in _GROUPS for name, value in given_settings(group, self._options)}
        fields = StoreSettings.model_fields
        values[env_name(fields["redis_url"])] = self._store.require_url()
        values[env_name(fields["prefix"])] = self._store.prefix
        fields = RuntimeSettings.model_fields
        values[env_name(fields["drain_s"])] = f"{self._drain_s:g}"
        values[env_name(fields["log"])] = self._log
        fields = FrontendSettings.model_fields
        chosen = origins(FrontendSettings, _given(self._options))
        for name, value in (("router_mode", ROUTER_MODE), ("http_host", HTTP_HOST)):
            if chosen[name] == "default":
                values[env_name(fields[name])] = value
        if SystemSettings.load().system_port > 0:  # one port is not enough for several processes
            values[env_name(SystemSettings.model_fields["system_port"])] = "0"
        unknown = unknown_settings()  # `up` has printed them; the services must not do so again
        environment = child_environment(values)
        return {name: value for name, value in environment.items() if name.upper() not in unknown}


def curl_line(url: str, model: str, *, embeds: bool = False) -> str:
    """Return a command for a POSIX shell that sends the model a chat, or a text if it `embeds`."""
    path, field = ("embeddings", "input") if embeds else ("chat/completions", "messages")
    body = {"model": model, field: "Hello!" if embeds else [{"role": "user", "content": "Hello!"}]}
    words = ("curl", f"{url}/v1/{path}", "-H", "Content-Type: application/json", "-d", json.dumps(body))
    return shlex.join(words)


def _given(options: Mapping[str, str | None]) -> set[str]:
    return {name for name, value in options.items() if value is not None}
