"""From the command line's options to what they name (the registry, the object store, the locks), and the
event loop that a command runs in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_redis.cli import collection
from dynamo_redis.cli.failures import say
from dynamo_redis.cli.options import load
from dynamo_redis.config import (
    EventSettings,
    RuntimeSettings,
    StoreSettings,
    origins,
    running_deployments,
    unknown_settings,
)
from dynamo_redis.store.base import Locks, ObjectStore, Registry
from dynamo_redis.store.event_base import EventStreams

if TYPE_CHECKING:
    from dynamo_redis.runtime.runtime import DistributedRuntime

Answer = TypeVar("Answer")


def run(main: Coroutine[Any, Any, Answer]) -> Answer:
    """Run a command that asks Redis something. Ctrl-C cancels it and raises KeyboardInterrupt."""
    return asyncio.run(main)


@asynccontextmanager
async def open_registry(
    options: Mapping[str, Any], *, read_only: bool = True, default_level: str = "warn"
) -> AsyncIterator[Registry]:
    """The registry that the options and the settings name. Raises ConfigError and StoreError.

    `read_only`: it writes nothing, and a user who may only read can open it. `default_level`: log level,
    unless one was asked for. At "error" a single write, whose failure says why, is not warned of as well.
    """
    from dynamo_redis.store.connect import open_read_only, open_store

    _begin(options, default_level)
    settings = load(StoreSettings, options)
    registry, objects = open_read_only(settings) if read_only else open_store(settings)
    try:
        await registry.start()
        yield registry
    finally:
        await registry.aclose()
        await objects.aclose()


@asynccontextmanager
async def open_objects(options: Mapping[str, Any], *, read_only: bool = True) -> AsyncIterator[ObjectStore]:
    """The object store that the options and the settings name. Raises ConfigError and StoreError."""
    from dynamo_redis.store.connect import open_read_only, open_store

    async with open_registry(options):
        pass  # it has checked the server, the password and the schema
    settings = load(StoreSettings, options)
    registry, objects = open_read_only(settings) if read_only else open_store(settings)
    try:
        yield objects
    finally:
        await objects.aclose()
        await registry.aclose()


@asynccontextmanager
async def open_locks(options: Mapping[str, Any]) -> AsyncIterator[Locks]:
    """The locks that the options and the settings name. Raises ConfigError and StoreError."""
    from dynamo_redis.store import connect

    async with open_registry(options):
        pass  # it has checked the server, the password and the schema
    locks = connect.open_locks(load(StoreSettings, options))
    try:
        yield locks
    finally:
        await locks.aclose()


@asynccontextmanager
async def open_events(options: Mapping[str, Any]) -> AsyncIterator[EventStreams]:
    """The event streams that the options and the settings name. Raises ConfigError and StoreError."""
    from dynamo_redis.store import connect

    async with open_registry(options):
        pass  # it has checked the server, the password and the schema
    streams = connect.open_events(load(StoreSettings, options), EventSettings.load())
    try:
        yield streams
    finally:
        await streams.aclose()


@asynccontextmanager
async def open_runtime(options: Mapping[str, Any]) -> AsyncIterator[DistributedRuntime]:
    """A runtime, for a command that asks services themselves; it writes nothing. Raises ConfigError and
    StoreError."""
    from dynamo_redis.runtime.runtime import DistributedRuntime, Settings
    from dynamo_redis.store.connect import open_read_only

    _begin(options)
    settings = Settings(store=load(StoreSettings, options))
    registry, objects = open_read_only(settings.store)
    async with DistributedRuntime(settings=settings, registry=registry, objects=objects) as runtime:
        yield runtime


def _begin(options: Mapping[str, Any], default_level: str = "warn") -> None:
    """Do what each command does before it asks anything."""
    from dynamo_redis.runtime.logging import configure_dynamo_logging

    collection.resume()  # a watch may run for days
    configure_dynamo_logging(service_name="cli", level=_log_level(options, default_level))
    for sentence in unknown_settings().values():
        say(sentence)
    note_choice(options)


def note_choice(options: Mapping[str, Any]) -> None:
    """Say which `up` of this user is taken, where several run and none was named."""
    given = {name for name, value in options.items() if value is not None}
    if origins(StoreSettings, given)["redis_url"] != "default":
        return
    running = running_deployments()
    if len(running) > 1:
        *others, taken = (deployment.get("http_url", "?") for deployment in running)
        say(
            f"{len(running)} deployments of `up` run: this is about the last one started, {taken}, not "
            f"{', '.join(others)}; --redis-url (DYN_REDIS_URL) names another"
        )


def _log_level(options: Mapping[str, Any], default: str = "warn") -> str:
    """The level that was asked for; else warnings at most, since a command's answer is what matters."""
    level = load(RuntimeSettings, options).log
    chosen = options.get("log") is not None or origins(RuntimeSettings)["log"] != "default"
    return level if chosen else default
