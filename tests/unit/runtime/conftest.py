"""A scripted request plane, and views fed by hand."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Any, Self

import pytest

from dynamo_redis.errors import CannotConnect, ConnectionLost
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.discovery import EndpointView
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.store.base import (
    Delete,
    DeleteCause,
    LeaseId,
    Put,
    Record,
    Registry,
    Revision,
    WatchBatch,
)
from dynamo_redis.wire.frame import NO_HEADERS, Encoding, Packed, payload_of

NAME = EndpointName.parse("dynamo.backend.generate")


class ScriptedStream:
    """A response with scripted items, errors to raise, or None to wait until it is failed."""

    def __init__(self, plane: ScriptedPlane, target: Target, script: Iterable[Any], request: Any) -> None:
        self._plane = plane
        self.packed = Packed(payload_of(request), Encoding.MSGPACK, NO_HEADERS)
        self._script = deque(script)
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.target = target
        self.sent = target.instance_id not in plane.unconnected

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if self._failed.done():
            self._failed.result()
        if not self._script:
            raise StopAsyncIteration
        step = self._script.popleft()
        if step is None:
            await self._failed
        if isinstance(step, Exception):
            raise step
        return step

    def take_ready(self) -> list[Any]:
        """Return the items before the next error or wait."""
        ready = []
        while self._script and self._script[0] is not None and not isinstance(self._script[0], Exception):
            ready.append(self._script.popleft())
        return ready

    @property
    def is_over(self) -> bool:
        return not self._script and not self._failed.done()

    def forget_request(self) -> None: ...

    def call_soon(self, callback: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # after the test
            asyncio.get_running_loop().call_soon_threadsafe(callback)

    def abandon(self) -> None:
        self.fail(ConnectionLost("the answer was not wanted"))

    def fail(self, error: Exception) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()
        self._plane.failed.append((self.target.instance_id, error))

    async def aclose(self) -> None:
        self.fail(ConnectionLost("closed by the reader"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class ScriptedPlane:
    """A request plane without a network. `scripts`, `alive` and `hanging` control each instance."""

    def __init__(self) -> None:
        self.scripts: dict[int, list[Any]] = {}
        self.alive: dict[int, bool] = {}
        self.hanging: set[int] = set()
        self.unconnected: set[int] = set()
        self.opened: list[tuple[int, Any]] = []
        self.failed: list[tuple[int, Exception]] = []
        self.forgotten: list[Target] = []
        self.probed: list[int] = []

    pending_count = 0
    connection_count = 0

    def open(
        self,
        target: Target,
        request: Any,
        context: Context | None,
        *,
        messages: AsyncIterable[Any] | None = None,
    ) -> ScriptedStream:
        value = request.value() if isinstance(request, Packed) else request
        self.opened.append((target.instance_id, value))
        script = self.scripts.get(target.instance_id, [target.instance_id])
        return ScriptedStream(self, target, script, value)

    async def probe(self, target: Target, timeout_s: float) -> None:
        self.probed.append(target.instance_id)
        await asyncio.sleep(0)
        if target.instance_id in self.hanging:
            await asyncio.Event().wait()
        if not self.alive.get(target.instance_id, True):
            raise CannotConnect("refused")

    def forget(self, target: Target) -> None:
        self.forgotten.append(target)

    async def aclose(self) -> None: ...


def instance(number: int, *, host: str = "h", ready: bool = True, secret: bytes | None = None) -> Instance:
    """Return instance `number`, at port `number` of `host`."""
    subject = NAME.subject(number)
    return Instance(NAME, InstanceId(number), {"tcp": f"{host}:{number}/{subject}"}, ready, secret)


def put(of: Instance, value: bytes | None = None) -> Put:
    """Return the event of an instance's registration."""
    revision = Revision("1-0")
    key = NAME.instance_key(of.instance_id)
    stored = of.to_bytes() if value is None else value
    return Put(Record(key, stored, revision, revision, 1, LeaseId(of.instance_id)))


def gone(number: int, cause: DeleteCause) -> Delete:
    """Return the event of an instance's deletion."""
    return Delete(NAME.instance_key(number), Revision("2-0"), cause)


def batch(*events: Put | Delete, resync: str | None = None) -> WatchBatch:
    """Return events that arrive together."""
    return WatchBatch(events, Revision("9-0"), resync)


class HeldClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


class OneRecord:
    """A registry with one key: the record that a client reads again."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.reads = 0

    async def get(self, key: str) -> Record | None:
        self.reads += 1
        return self.record


class Bench:
    """A view and a client over a scripted plane."""

    def __init__(self) -> None:
        self.plane = ScriptedPlane()
        self.clock = HeldClock()
        self.registry = OneRecord()
        registry: Registry = self.registry  # type: ignore[assignment]
        self.view = EndpointView(NAME, registry, "tcp", self.plane, lease_ttl_s=10, clock=self.clock)
        self.client = Client(self.view, self.plane, "round_robin", release=_nothing)

    def register(self, *numbers: int) -> None:
        self.view.apply(batch(*(put(instance(number)) for number in numbers)))

    def known(self) -> set[int]:
        return {member.instance_id for member in self.view}

    def confirmed(self) -> list[int]:
        return [instance.instance_id for instance in self.client.confirmed_instances()]

    def chosen_first(self) -> list[int]:
        return [member.instance_id for member in self.view.candidates]


async def _nothing() -> None: ...


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.view.aclose()
