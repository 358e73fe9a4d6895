"""From the command line's options to what they name (the registry, the object store, the locks), and the
event loop that a command runs in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_redis.cli import collection
from dynamo_redis.cli.options import load
from dynamo_redis.config import EventSettings, RuntimeSettings, StoreSettings, origins
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
    options: Mapping[str, Any], *, default_level: str = "warn"
) -> AsyncIterator[Registry]:
    """The registry that the options and the settings name. Raises ConfigError and StoreError.

    `default_level`: log level, unless one was asked for. At "error" a single write, whose failure says why,
    is not warned of as well.
    """
    async with _open_store(options, default_level) as (registry, _):
        yield registry


@asynccontextmanager
async def open_objects(options: Mapping[str, Any]) -> AsyncIterator[ObjectStore]:
    """The object store that the options and the settings name. Raises ConfigError and StoreError."""
    async with _open_store(options) as (_, objects):
        yield objects


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
    """A runtime, for a command that asks services themselves. Raises ConfigError and StoreError."""
    from dynamo_redis.runtime.logging import configure_dynamo_logging
    from dynamo_redis.runtime.runtime import DistributedRuntime, Settings

    collection.resume()
    configure_dynamo_logging(service_name="cli", level=_log_level(options))
    settings = Settings(store=load(StoreSettings, options))
    async with DistributedRuntime(settings=settings) as runtime:
        yield runtime


@asynccontextmanager
async def _open_store(
    options: Mapping[str, Any], default_level: str = "warn"
) -> AsyncIterator[tuple[Registry, ObjectStore]]:
    from dynamo_redis.runtime.logging import configure_dynamo_logging
    from dynamo_redis.store.connect import open_store

    collection.resume()  # a watch may run for days
    configure_dynamo_logging(service_name="cli", level=_log_level(options, default_level))
    registry, objects = open_store(load(StoreSettings, options))
    try:
        await registry.start()  # also for objects: it checks the server, the password and the schema
        yield registry, objects
    finally:
        await registry.aclose()
        await objects.aclose()


def _log_level(options: Mapping[str, Any], default: str = "warn") -> str:
    """The level that was asked for; else warnings at most, since a command's answer is what matters."""
    level = load(RuntimeSettings, options).log
    chosen = options.get("log") is not None or origins(RuntimeSettings)["log"] != "default"
    return level if chosen else default
