"""Connections of commands: the registry, object store, locks, event streams or runtime that options name."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_redis.cli import collection
from dynamo_redis.cli.failures import print_stderr
from dynamo_redis.cli.options import load
from dynamo_redis.config import (
    EventSettings,
    PlaneSettings,
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

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a command's coroutine in a new event loop. Ctrl-C cancels it and raises KeyboardInterrupt."""
    return asyncio.run(main)


@asynccontextmanager
async def open_registry(
    options: Mapping[str, Any], *, read_only: bool = True, default_level: str = "warn"
) -> AsyncIterator[Registry]:
    """Open the registry that the options and the settings name. Raises ConfigError and StoreError.

    `read_only`: the command writes nothing, so a Redis user with read permission is enough. `default_level`:
    the log level unless one is set. Commands that write once use "error": the failure itself is printed, and
    a warning in the log would say it twice.
    """
    from dynamo_redis.store.connect import open_read_only, open_store

    start_command(options, default_level)
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
    """Open the object store that the options and the settings name. Raises ConfigError and StoreError."""
    from dynamo_redis.store.connect import open_read_only, open_store

    async with open_registry(options):
        pass  # opening it checks the server, the password and the schema
    settings = load(StoreSettings, options)
    registry, objects = open_read_only(settings) if read_only else open_store(settings)
    try:
        yield objects
    finally:
        await objects.aclose()
        await registry.aclose()


@asynccontextmanager
async def open_locks(options: Mapping[str, Any]) -> AsyncIterator[Locks]:
    """Open the locks that the options and the settings name. Raises ConfigError and StoreError."""
    from dynamo_redis.store import connect

    async with open_registry(options):
        pass  # opening it checks the server, the password and the schema
    locks = connect.open_locks(load(StoreSettings, options))
    try:
        yield locks
    finally:
        await locks.aclose()


@asynccontextmanager
async def open_events(options: Mapping[str, Any], *, read_only: bool = True) -> AsyncIterator[EventStreams]:
    """Open the event streams that the options and the settings name. Raises ConfigError and StoreError."""
    from dynamo_redis.store import connect

    async with open_registry(options):
        pass  # opening it checks the server, the password and the schema
    open_streams = connect.open_read_only_events if read_only else connect.open_events
    streams = open_streams(load(StoreSettings, options), EventSettings.load())
    try:
        yield streams
    finally:
        await streams.aclose()


@asynccontextmanager
async def open_runtime(options: Mapping[str, Any]) -> AsyncIterator[DistributedRuntime]:
    """Open a runtime for a command that calls services. It only reads the registry.

    Raises ConfigError and StoreError.
    """
    from dynamo_redis.runtime.runtime import DistributedRuntime, Settings
    from dynamo_redis.store.connect import open_read_only

    start_command(options)
    plane = PlaneSettings.load(request_plane=options.get("request_plane"))
    settings = Settings(store=load(StoreSettings, options), plane=plane)
    registry, objects = open_read_only(settings.store)
    async with DistributedRuntime(settings=settings, registry=registry, objects=objects) as runtime:
        yield runtime


def start_command(options: Mapping[str, Any], default_level: str = "warn") -> None:
    """Configure the log, and print notices on the settings. The log level is at most a warning unless one is
    set: the output of a command is what matters.
    """
    from dynamo_redis.runtime.logging import configure_dynamo_logging

    collection.resume()  # a watch may run for days
    level = load(RuntimeSettings, options).log
    configure_dynamo_logging(service_name="cli", level=level if _has_level(options) else default_level)
    _note_settings(options)


def start_silent_command(options: Mapping[str, Any]) -> None:
    """As `start_command`, for a short command that logs nothing unless a log level is set: without it, the
    set-up of the log need not be loaded."""
    if _has_level(options):
        start_command(options)
        return
    logging.getLogger("dynamo_redis").setLevel(logging.CRITICAL)
    _note_settings(options)


def _has_level(options: Mapping[str, Any]) -> bool:
    """Return whether a log level is set."""
    return options.get("log") is not None or origins(RuntimeSettings)["log"] != "default"


def _note_settings(options: Mapping[str, Any]) -> None:
    """Print notices on variables that no setting has, and on the choice among several servers."""
    for sentence in unknown_settings().values():
        print_stderr(sentence)
    note_chosen_deployment(options)


def note_chosen_deployment(options: Mapping[str, Any]) -> None:
    """Print which running `up` of this user is used, if several run and no Redis is set."""
    given = {name for name, value in options.items() if value is not None}
    if origins(StoreSettings, given)["redis_url"] != "default":
        return
    running = running_deployments()
    if len(running) > 1:
        *others, taken = (deployment.get("http_url", "?") for deployment in running)
        print_stderr(
            f"{len(running)} deployments of `up` run: this command uses the last one started, {taken}, not "
            f"{', '.join(others)}; --redis-url (DYN_REDIS_URL) names another"
        )
