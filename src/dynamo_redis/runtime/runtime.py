"""The distributed runtime: the connections and endpoints of one process of a deployment."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar, cast
from weakref import finalize

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.config import (
    EventSettings,
    PlaneSettings,
    RuntimeSettings,
    SettingsGroup,
    StoreSettings,
    SystemSettings,
)
from dynamo_redis.errors import ConfigError
from dynamo_redis.exposition import Family, Source
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.planes.base import RequestPlaneClient, RequestPlaneServer, Target
from dynamo_redis.planes.select import make_client, make_server
from dynamo_redis.runtime.advertised import check_advertised
from dynamo_redis.runtime.awaitables import started
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.connecting import start_registry
from dynamo_redis.runtime.discovery import EndpointView
from dynamo_redis.runtime.endpoint import Endpoint, Namespace, note_ignored
from dynamo_redis.runtime.handlers import AnyHandler
from dynamo_redis.runtime.instance import Instance, transport_name
from dynamo_redis.runtime.service import Service, StatsHandler, service_subject
from dynamo_redis.runtime.serving import ServedEndpoint
from dynamo_redis.runtime.shutdown import ShutdownDeadline
from dynamo_redis.runtime.system.health import ProcessState
from dynamo_redis.runtime.system.labels import check_labels
from dynamo_redis.runtime.withdrawal import withdraw
from dynamo_redis.store.base import Locks, ObjectStore, Registration, Registry
from dynamo_redis.store.connect import open_whole_store
from dynamo_redis.store.event_base import EventStreams

if TYPE_CHECKING:
    from dynamo_redis.runtime.system.server import RuntimeServer

log = logging.getLogger(__name__)

_LEAST_CLOSING_S: Final = 2.0
_EVENT_PLANES: Final = ("stream", "pubsub", "none")


class Attached(Protocol):
    """An object that the runtime closes with itself."""

    async def aclose(self) -> None:
        """Close the object, in bounded time. Idempotent; must not raise."""
        ...


Thing = TypeVar("Thing", bound=Attached)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a runtime, by group."""

    store: StoreSettings = field(default_factory=StoreSettings.load)
    plane: PlaneSettings = field(default_factory=PlaneSettings.load)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings.load)
    events: EventSettings = field(default_factory=EventSettings.load)
    system: SystemSettings = field(default_factory=SystemSettings.load)

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read all groups from the environment; `overrides` replace fields of any of them.

        Raises ConfigError.
        """

        def of(group: type[SettingsGroup]) -> dict[str, Any]:
            return {name: overrides.pop(name) for name in tuple(overrides) if name in group.model_fields}

        settings = cls(
            store=StoreSettings.load(**of(StoreSettings)),
            plane=PlaneSettings.load(**of(PlaneSettings)),
            runtime=RuntimeSettings.load(**of(RuntimeSettings)),
            events=EventSettings.load(**of(EventSettings)),
            system=SystemSettings.load(**of(SystemSettings)),
        )
        if overrides:
            raise ConfigError(f"unknown settings: {', '.join(sorted(overrides))}")
        return settings


class DistributedRuntime:
    """One process of a deployment: it serves and calls endpoints, which are found through one Redis.

    Create it on the event loop's thread. It connects at `start`, or at the first call that needs a
    connection. It owns the process's lease, its request plane server and client, and one watch for each
    endpoint that it calls. `aclose` ends all of them in order: leave the registry, drain, revoke the lease,
    close. `async with` calls `start` and `aclose`.

    While Redis does not answer, calls go on with the last known instances. When it is back, all endpoints are
    registered again under the same instance id.
    """

    def __init__(
        self,
        event_loop: asyncio.AbstractEventLoop | None = None,
        discovery_backend: str | None = None,
        request_plane: str | None = None,
        enable_nats: bool | None = None,
        *,
        event_plane: str | None = None,
        response_plane: str | None = None,
        settings: Settings | None = None,
        registry: Registry | None = None,
        objects: ObjectStore | None = None,
        locks: Locks | None = None,
        events: EventStreams | None = None,
        **later: object,
    ) -> None:
        """Make a runtime. Raises ConfigError for wrong settings.

        Args:
            event_loop: ignored; the runtime uses the running loop.
            discovery_backend: only "redis" exists here; another one is named in the log.
            request_plane: replaces `DYN_REQUEST_PLANE`.
            enable_nats: ignored.
            event_plane: replaces `DYN_EVENT_PLANE`; a plane that does not exist here is named in the log.
            response_plane: only "tcp" exists here; another one is named in the log.
            settings: used instead of the environment's.
            registry, objects, locks, events: used instead of Redis, as the in-memory implementations in
                tests. The runtime closes them.
            later: arguments of later releases of `dynamo.runtime`, named in the log.
        """
        if settings is None:
            own_event_plane = event_plane if event_plane in _EVENT_PLANES else None
            settings = Settings.load(request_plane=request_plane, event_plane=own_event_plane)
        self.settings = settings
        if event_plane is not None and event_plane != settings.events.event_plane:
            log.info("event_plane=%r is ignored: DYN_EVENT_PLANE selects the event plane", event_plane)
        if response_plane not in (None, "tcp"):
            log.info("response_plane=%r is ignored: responses use the request plane", response_plane)
        note_ignored("DistributedRuntime", later)
        if discovery_backend not in (None, "redis"):
            log.info("discovery_backend=%r is ignored: discovery here is Redis", discovery_backend)
        # The address to advertise is the one on the route to Redis; a given registry has no URL.
        self._redis_url = settings.store.require_url() if registry is None else None
        if registry is None:
            registry, objects, locks, events = open_whole_store(settings.store, settings.events)
        self.registry = registry
        self._objects = objects
        self._locks = locks
        self._events = events
        self._plane_client: RequestPlaneClient | None = None
        self._server: RequestPlaneServer | None = None
        self._service: Service
        self._secret = secrets.token_bytes(32) if settings.plane.auth == "secret" else None
        self._served: list[ServedEndpoint] = []
        self._views: dict[EndpointName, _SharedView] = {}
        self._attached: dict[Hashable, Attached] = {}
        self._starting = asyncio.Lock()
        self._shutdown = asyncio.Event()
        self._deadline = ShutdownDeadline(settings.runtime.drain_s, settings.runtime.closing_s)
        self._signals: list[signal.Signals] = []
        self._metric_sources: dict[object, Source] = {}
        self._state = ProcessState(
            self.registry,
            endpoints=lambda: self._served,
            server=lambda: self._server,
            client=lambda: self._plane_client,
            sources=self._metric_sources.values(),
            is_serving=lambda: self._is_serving,
            is_shutting_down=lambda: self.is_shutting_down,
        )
        self._system: RuntimeServer | None = None
        self._is_serving = False
        self._closed = False

    # ----------------------------------------------------------------- lifetime

    async def start(self) -> None:
        """Connect. With `DYN_WAIT_FOR_REDIS` wait until Redis answers, or until `shutdown`.

        Raises ConfigError, StoreUnavailable, StoreRefused or SchemaMismatch, and may then be called again.
        Has no effect after it has succeeded.
        """
        async with self._starting:
            if self._plane_client is not None:
                return
            if self._closed:
                raise RuntimeError("the runtime is closed")
            self._open_system_port()

            def on_quiet(target: Target) -> None:
                for shared in self._views.values():
                    shared.view.note_quiet(target)

            plane_client = make_client(self.settings.plane, store=self.settings.store, on_quiet=on_quiet)
            try:
                waits = self.settings.runtime.wait_for_redis
                await start_registry(self.registry, self._shutdown, waits=waits)
            except BaseException:
                await plane_client.aclose()
                raise
            self._plane_client = plane_client

    def _open_system_port(self) -> None:
        """Serve `/health`, `/live` and `/metrics` if `DYN_SYSTEM_PORT` is set. Raises ConfigError."""
        settings = self.settings.system
        if settings.system_port < 0 or self._system is not None:
            return
        from dynamo_redis.runtime.system.server import RuntimeServer

        self._system = RuntimeServer(settings, self._state, self.settings.store.loop_stall_s)

    def note_serving(self) -> None:
        """Let `/health` say that this process serves, as from its first endpoint on. A process without
        endpoints calls this."""
        self._is_serving = True

    def metrics(self) -> list[Family]:
        """Return the figures of `/metrics` of now."""
        return self._state.metrics()

    def add_metrics(self, source: Source) -> Callable[[], None]:
        """Show further metrics of this process on `/metrics`. Return the function that ends that."""
        key = object()
        self._metric_sources[key] = source

        def remove() -> None:
            self._metric_sources.pop(key, None)

        return remove

    @property
    def system_address(self) -> str | None:
        """`host:port` of `/health`, `/live` and `/metrics`; None without `DYN_SYSTEM_PORT`."""
        return None if self._system is None else self._system.address

    def shutdown(self) -> None:
        """Start the shutdown: served endpoints end, and waits for instances. Returns at once; idempotent.

        The shutdown's deadline, `DYN_GRACEFUL_SHUTDOWN_S`, runs from the first call.
        """
        self._deadline.begin()
        self._shutdown.set()
        for shared in self._views.values():
            shared.view.end_waits()

    @property
    def shutdown_deadline(self) -> ShutdownDeadline:
        """The deadline of the shutdown, which runs from the first `shutdown`."""
        return self._deadline

    @property
    def is_shutting_down(self) -> bool:
        """True after `shutdown` was called."""
        return self._shutdown.is_set()

    async def wait_for_shutdown(self) -> None:
        """Wait until `shutdown` is called. With `handle_signals`, signals call it."""
        await self._shutdown.wait()

    def handle_signals(self) -> None:
        """Let SIGTERM, SIGINT and SIGHUP call `shutdown`, until `aclose`. A second has its default effect.

        SIGHUP, the end of a terminal, is left alone if it is ignored, as by nohup, or has a handler.
        """
        loop = asyncio.get_running_loop()

        def on_signal(number: signal.Signals) -> None:
            self._release_signals()
            log.info(
                "%s: shutting down within %g s; a second signal ends this process at once",
                number.name,
                self._deadline.total_s,
            )
            self.shutdown()

        def handle(number: signal.Signals) -> None:
            loop.add_signal_handler(number, on_signal, number)
            self._signals.append(number)

        # Only the main thread may add handlers, and Windows has none.
        with suppress(NotImplementedError, ValueError, RuntimeError):
            handle(signal.SIGTERM)
            handle(signal.SIGINT)
            if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
                handle(signal.SIGHUP)

    async def aclose(self) -> None:
        """Leave the registry, drain, revoke the lease, close. Idempotent.

        It ends within `DYN_GRACEFUL_SHUTDOWN_S` of the first `shutdown`. Each attached object and the
        registry have at least `_LEAST_CLOSING_S` to close; only a wait for a silent Redis needs that long.
        """
        if self._closed:
            return
        self._closed = True
        self.shutdown()
        await self.leave()
        if self._server is not None:
            # Together, so that all callers learn of it at once, and endpoints without a graceful shutdown end
            # now.
            await asyncio.gather(
                self._server.drain(self._deadline.requests_left_s),
                *(served.unregister() for served in self._served),
            )
        for attached in reversed(tuple(self._attached.values())):
            await self._in_time(attached.aclose(), repr(attached))
        await self._in_time(self.registry.aclose(), "the registry")
        for shared in tuple(self._views.values()):
            await shared.view.aclose()
        self._views.clear()
        if self._plane_client is not None:
            await self._plane_client.aclose()
        if self._server is not None:
            await self._server.aclose()
        if self._objects is not None:
            await self._objects.aclose()
        if self._locks is not None:
            await self._locks.aclose()
        if self._events is not None:
            await self._events.aclose()
        if self._system is not None:
            await self._system.aclose()
        self._release_signals()

    async def _in_time(self, closing: Awaitable[None], what: str) -> None:
        """Await the closing of a part at most until the shutdown's deadline; then log it and go on."""
        limit_s = max(self._deadline.left_s, _LEAST_CLOSING_S)
        try:
            async with asyncio.timeout(limit_s):
                await closing
        except TimeoutError:
            log.warning("%s could not be closed within %.1f s, the rest of the shutdown", what, limit_s)

    async def leave(self, *registrations: Registration) -> None:
        """Withdraw these registrations and then every served endpoint's; requests are still answered.

        Waits for a silent Redis at most `DYN_REDIS_TIMEOUT_S` in all, and does not raise if it does not
        answer.
        """
        records = [record for served in self._served for record in served.release_registrations()]
        await withdraw((*registrations, *records))

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def _release_signals(self) -> None:
        loop = asyncio.get_running_loop()
        while self._signals:
            loop.remove_signal_handler(self._signals.pop())

    # ----------------------------------------------------------------- parts and endpoints

    @property
    def objects(self) -> ObjectStore:
        """The object store. Raises RuntimeError if a registry was given and no object store with it."""
        if self._objects is None:
            raise RuntimeError("the runtime was made without an object store")
        return self._objects

    @property
    def locks(self) -> Locks:
        """The locks. Raises RuntimeError if a registry was given and no locks with it."""
        if self._locks is None:
            raise RuntimeError("the runtime was made without locks")
        return self._locks

    @property
    def events(self) -> EventStreams:
        """The event streams. Raises RuntimeError if a registry was given and no event streams with it."""
        if self._events is None:
            raise RuntimeError("the runtime was made without event streams")
        return self._events

    @property
    def instance_id(self) -> InstanceId:
        """The id of every instance that this process serves, and of its lease."""
        return InstanceId(self.registry.lease_id)

    def endpoint(self, path: str) -> Endpoint:
        """Return the endpoint `namespace.component.endpoint`.

        Raises ConfigError (a ValueError) for other names.
        """
        return Endpoint(self, EndpointName.parse(path))

    def namespace(self, name: str) -> Namespace:
        """Return a namespace, the older way to an endpoint:

        `runtime.namespace(n).component(c).endpoint(e)`.
        """
        return Namespace(self, name)

    def attach(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        """Return the object of a key; `make` creates it at the first call. A key has always the same type.

        The runtime closes the object after the drain, and before its own connections.
        """
        if key not in self._attached:
            self._attached[key] = make()
        return cast("Thing", self._attached[key])

    # ----------------------------------------------------------------- for endpoints

    async def serve(
        self,
        name: EndpointName,
        handler: AnyHandler,
        *,
        graceful_shutdown: bool,
        stats_handler: StatsHandler | None = None,
        is_bidirectional: bool = False,
        metrics_labels: list[tuple[str, str]] | None = None,
        health_check_payload: Any = None,
    ) -> ServedEndpoint:
        """Open an endpoint for requests and register it.

        Raises StoreError, ConfigError, and ValueError for wrong `metrics_labels`.
        """
        labels = check_labels(metrics_labels)
        await self.start()
        server = await self._plane_server()
        instance_id = self.instance_id
        instance = Instance(
            name=name,
            instance_id=instance_id,
            transports={
                transport_name(plane): f"{address}/{name.subject(instance_id)}"
                for plane, address in server.addresses.items()
            },
            secret=self._secret,
            started_at=SYSTEM_CLOCK.wall(),
        )
        served = ServedEndpoint(
            server,
            self.registry,
            instance,
            graceful_shutdown=graceful_shutdown,
            shutdown=self._deadline,
            service=self._service,
            metrics_labels=labels,
        )
        await served.start(
            handler,
            stats_handler,
            is_bidirectional=is_bidirectional,
            health_check_payload=health_check_payload,
            settings=self.settings.system,
        )
        self._is_serving = True
        self._served = [other for other in self._served if not other.closed]
        self._served.append(served)
        return served

    def served(self, name: EndpointName) -> ServedEndpoint | None:
        """Return the served endpoint of that name; None if this process does not serve it."""
        for served in self._served:
            if served.instance.name == name and not served.closed:
                return served
        return None

    async def open_client(self, name: EndpointName, router_mode: str) -> Client:
        """Return a client on the endpoint's view, which all clients of the endpoint share.

        The garbage collector releases a client that was dropped without `aclose`, as happens if the task that
        waits for it is cancelled in the same turn of the event loop in which it is ready.
        """
        plane = self.settings.plane.require_one_plane()
        await self.start()
        assert self._plane_client is not None
        shared = self._views.get(name)
        if shared is None:
            view = EndpointView(
                name,
                self.registry,
                plane,
                self._plane_client,
                lease_ttl_s=self.settings.store.lease_ttl_s,
            )
            shared = self._views[name] = _SharedView(view)
        if self.is_shutting_down:
            shared.view.end_waits()
        user = object()
        shared.users.add(user)
        client = Client(
            shared.view, self._plane_client, router_mode, release=partial(self._release, name, user)
        )
        loop = asyncio.get_running_loop()
        finalize(client.dispatcher, self._release_dropped, loop, name, user).atexit = False
        try:
            await shared.view.start(self.settings.store.command_timeout_s)
        except BaseException:
            await client.aclose()
            raise
        return client

    def _release_dropped(self, loop: asyncio.AbstractEventLoop, name: EndpointName, user: object) -> None:
        """Release a dropped client. The garbage collector calls this, in any thread."""
        shared = self._views.get(name)
        if shared is not None and user in shared.users:
            with suppress(RuntimeError):  # the event loop has closed
                loop.call_soon_threadsafe(lambda: started(self._release(name, user)))

    async def _release(self, name: EndpointName, user: object) -> None:
        """Release one client's share of a view; the last release closes the view."""
        shared = self._views.get(name)
        if shared is None:
            return
        shared.users.discard(user)
        if not shared.users:
            del self._views[name]
            await shared.view.aclose()

    async def _plane_server(self) -> RequestPlaneServer:
        """Return the request plane's server; start it, and check its address, at the first call."""
        async with self._starting:
            if self._server is None:
                server = make_server(
                    self.settings.plane,
                    instance_id=self.instance_id,
                    secret=self._secret,
                    store=self.settings.store,
                    redis_url=self._redis_url,
                    loop_stall_s=self.settings.store.loop_stall_s,
                )
                await server.start()
                try:
                    assert self._plane_client is not None
                    target = Target(self.instance_id, server.address, "", self._secret)
                    await check_advertised(self._plane_client, target, self.settings.plane)
                    if self._closed:
                        raise RuntimeError("the runtime is closed")
                    self._service = Service(server, self.instance_id)
                    server.register(service_subject(self.instance_id), self._service.answer)
                    await server.announce(self._service.describe)
                except BaseException:
                    await server.aclose()
                    raise
                self._server = server
            return self._server


@dataclass(slots=True)
class _SharedView:
    """A view and its users: one object for each client."""

    view: EndpointView
    users: set[object] = field(default_factory=set)
