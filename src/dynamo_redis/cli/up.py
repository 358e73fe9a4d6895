"""`dynamo-redis up`: everything on this machine, in one command."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import click

from dynamo_redis.cli import collection, connect, probe
from dynamo_redis.cli.children import Service
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
"""How long requests under way may go on after Ctrl-C, unless `--drain` says so: `up` is to end within 5 s."""
GRACE_BEYOND_DRAIN_S = 1.5
ROUTER_MODE = "kv"
"""How the frontend chooses, unless `--router-mode` or the environment says so."""
HTTP_HOST = "127.0.0.1"
"""Where the frontend listens, unless `--http-host` or the environment says so: what runs for a trial on one
machine is for that machine."""
SERVING_TIMEOUT_S = 10.0
_LOOK_S = 1.0
_FIRST_LOOK_S = 0.02
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
    help="How many mock workers to start.  [default 2]",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep the data of the embedded Redis here.  [default: a temporary directory]",
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
    """Start a Redis, a frontend and mock workers, each as its own process, and show how they are.

    With --redis-url or DYN_REDIS_URL that server is used instead of an embedded one. Ctrl-C stops
    everything within 5 s. A worker that dies is started again. Meanwhile the other commands of this user
    find the Redis by themselves.

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
        load(group, options)  # a wrong setting is said before anything starts
    external = origins(StoreSettings, _given(options))["redis_url"] != "default"
    if external and data_dir is not None:
        raise click.UsageError("--data-dir is for the embedded Redis, but a Redis is given")
    with _directory(data_dir, needed=not external) as directory:
        asyncio.run(_Up(options, workers_count, directory).run())


class _Up:
    """One run of the command. `directory` is for the data of an embedded Redis; None if one is given."""

    def __init__(self, options: Mapping[str, str | None], workers_count: int, directory: Path | None) -> None:
        self._options = options
        self._stopping = asyncio.Event()
        self._display: Display = make_display()
        server = None if directory is None else EmbeddedServer(directory)
        # With a server of our own, what another running `up` says of its server must not count.
        self._store = load(StoreSettings, options if server is None else {**options, "redis_url": server.url})
        runtime, chosen = load(RuntimeSettings, options), origins(RuntimeSettings, _given(options))
        self._drain_s = DRAIN_S if chosen["drain_s"] == "default" else runtime.drain_s
        # The status says what the services log at `info`: who has come, who has gone.
        self._log = "warn" if chosen["log"] == "default" else runtime.log
        self._held_lines: list[tuple[str, str]] | None = None if self._log == "debug" else []
        self._deployment = Deployment(
            server=server,
            frontend=Service("frontend", ("frontend",)),
            workers=[Service(f"worker-{n}", ("worker", "mock")) for n in range(1, workers_count + 1)],
            env=self._environment(),
            grace_s=self._drain_s + GRACE_BEYOND_DRAIN_S,
            notice=self._display.notice,
            log=self._on_log,
        )

    async def run(self) -> None:
        """Start, show, and stop at a signal. Raises what `Deployment.start` raises; nothing runs then."""
        with _on_signal(self._stop):
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

    def _on_log(self, service: str, line: str) -> None:
        """Pass a service's line on; before the deployment is up keep it, so that a failure is one line."""
        if self._held_lines is None:
            self._display.log(service, line)
        else:
            self._held_lines.append((service, line))

    def _release_held_lines(self) -> None:
        held, self._held_lines = self._held_lines or [], None
        for service, line in held:
            self._display.log(service, line)

    def _stop(self) -> None:
        if self._stopping.is_set():
            self._deployment.kill()  # asked twice: do not wait for requests under way
            return
        self._stopping.set()
        self._display.notice("Stopping.")

    async def _work(self) -> None:
        self._note_others()
        await self._note_strangers()
        await self._deployment.start()
        url = self._deployment.url
        # A frontend that is started again is found where the first one was, also where port 0 chose the port.
        self._deployment.env[env_name(FrontendSettings.model_fields["http_port"])] = str(urlsplit(url).port)
        write_runtime_file(redis_url=self._store.require_url(), prefix=self._store.prefix, http_url=url)
        status = await self._until_serving(url)
        collection.resume()
        self._release_held_lines()
        self._announce(url)
        while True:
            self._display.status(status)
            await asyncio.sleep(_LOOK_S)
            status = await self._look(url)

    def _note_others(self) -> None:
        """Say which variables have no effect, what runs already, and what commands find from now on."""
        for sentence in unknown_settings().values():
            self._display.notice(sentence)
        urls = [deployment.get("http_url", "?") for deployment in running_deployments()]
        if urls:
            self._display.notice(
                f"Another `up` of yours runs, at {', '.join(urls)}: while this one does, commands without "
                "--redis-url (DYN_REDIS_URL) are about this one."
            )

    async def _note_strangers(self) -> None:
        """Say which processes the registry has already: the frontend sends them requests, too."""
        if self._deployment.server is not None:
            return
        try:
            async with connect.open_registry(self._options) as registry:
                found = await registry.get_prefix(INSTANCES)
        except DynamoRedisError:
            return  # the services will say it
        count = len({record.key.rpartition("/")[2] for record in found.records})
        if count:
            self._display.notice(
                f"{count} process{'es are' if count > 1 else ' is'} registered already under the prefix "
                f"{self._store.prefix}, by others: this deployment joins them. --redis-prefix "
                "(DYN_REDIS_PREFIX) keeps them apart; `dynamo-redis instances` lists them."
            )

    async def _until_serving(self, url: str) -> Status:
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
        """Ask the frontend how it is."""
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

    def _announce(self, url: str) -> None:
        say = self._display.notice
        store = self._store
        embedded = "an embedded Redis" if self._deployment.server is not None else "Redis"
        say(f"dynamo-redis is up at {url}")
        say(f"  {embedded} at {redact(store.require_url())}, prefix {store.prefix}")
        if self._deployment.models:
            say("Try it:")
            say(f"  {curl_line(url, self._deployment.models[0])}")
        else:
            say("No worker runs. Start one beside it: dynamo-redis worker mock")
        say("Ctrl-C stops everything.")

    def _environment(self) -> dict[str, str]:
        """What the services are to know: all that was given to `up`, and where the registry is."""
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
        unknown = unknown_settings()  # said here, and not by each service once more
        environment = child_environment(values)
        return {name: value for name, value in environment.items() if name.upper() not in unknown}


def curl_line(url: str, model: str) -> str:
    """A command for a POSIX shell that asks the model something."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    words = ("curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body)
    return shlex.join(words)


def _given(options: Mapping[str, str | None]) -> set[str]:
    return {name for name, value in options.items() if value is not None}


@contextmanager
def _directory(data_dir: Path | None, *, needed: bool) -> Iterator[Path | None]:
    """Where the embedded Redis keeps its data; None if there is none."""
    if not needed:
        yield None
        return
    with data_directory(data_dir) as directory:
        yield directory


@contextmanager
def _on_signal(callback: Callable[[], None]) -> Iterator[None]:
    """Call back at Ctrl-C, SIGTERM, and when the terminal goes away."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, callback)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
