"""Calling an endpoint: the instances there are, and the ways of choosing among them."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import suppress
from typing import Any, Self

from dynamo_redis.errors import NoInstances
from dynamo_redis.planes.base import RequestPlaneClient
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.awaitables import failed, started
from dynamo_redis.runtime.call import Call
from dynamo_redis.runtime.discovery import EndpointView
from dynamo_redis.runtime.dispatch import Dispatcher
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.selection import Only, Policy, policy

log = logging.getLogger(__name__)

WAIT_SAID_S = 5.0
"""Pause between two warnings that there is no instance, while a client waits for one."""


class Client:
    """Sends requests to the instances of one endpoint.

    Each call chooses an instance and sends at once. It is awaited, and then iterated:

        async for item in await client.round_robin({"prompt": "hi"}, annotated=False):
            ...

    Until the first item has arrived, a request that fails in a retryable way goes to another instance, each
    instance at most once; afterwards its error is raised. Errors are `PlaneError`s; `NoInstances` at once if
    none is known. Leaving the iteration early kills the request at the worker, and so does dropping the
    iterator. Items are `Annotated` (`.data()`), or plain with `annotated=False`, where None is left out.
    """

    def __init__(
        self,
        view: EndpointView,
        plane_client: RequestPlaneClient,
        router_mode: str,
        *,
        release: Callable[[], Awaitable[None]],
        rng: random.Random | None = None,
    ) -> None:
        rng = rng or random.Random()  # noqa: S311 - spreading load, no secret
        self._view = view
        self.dispatcher = Dispatcher(view, plane_client)
        """For callers that choose by other means than the policies here, and send by the same."""
        self._release = release
        self._round_robin: Policy = policy("round_robin", rng)
        self._random: Policy = policy("random", rng)
        self._p2c: Policy = policy("p2c", rng)
        self._least_loaded: Policy = policy("least_loaded", rng)
        self._default: Policy = policy(router_mode, rng)

    # ----------------------------------------------------------------- calls

    def generate(
        self,
        request: Any,
        annotated: bool | None = True,
        context: Context | None = None,
        *,
        among: Collection[int] | None = None,
    ) -> asyncio.Future[Call]:
        """Call an instance chosen by the client's router mode; one of the ids in `among`, if given."""
        return self._call(self._default, request, annotated, context, among)

    def round_robin(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> asyncio.Future[Call]:
        """Call the next instance in turn."""
        return self._call(self._round_robin, request, annotated, context)

    def random(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> asyncio.Future[Call]:
        """Call any instance."""
        return self._call(self._random, request, annotated, context)

    def p2c(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> asyncio.Future[Call]:
        """Call the less loaded of two random instances."""
        return self._call(self._p2c, request, annotated, context)

    def least_loaded(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> asyncio.Future[Call]:
        """Call the instance with the fewest requests of this process under way."""
        return self._call(self._least_loaded, request, annotated, context)

    def direct(
        self,
        request: Any,
        instance_id: int,
        annotated: bool | None = True,
        context: Context | None = None,
    ) -> asyncio.Future[Call]:
        """Call one instance, and no other if it fails. It ends with NoInstances if it is not known."""
        if self._view.get(instance_id) is None:
            return failed(
                NoInstances(
                    f"instance {instance_id:x} is not among the {len(self._view)} known of {self._view.name}"
                )
            )
        return self._call(Only(instance_id), request, annotated, context)

    def _call(
        self,
        select: Policy,
        request: Any,
        annotated: bool | None,
        context: Context | None,
        among: Collection[int] | None = None,
    ) -> asyncio.Future[Call]:
        """Send the request, before it returns. What keeps it from being sent shows when it is awaited."""
        try:
            call = Call(self.dispatcher, select, request, bool(annotated), context, among)
        except Exception as exc:  # noqa: BLE001 - raised where it is awaited
            return failed(exc)
        future: asyncio.Future[Call] = asyncio.get_running_loop().create_future()
        future.set_result(call)
        return future

    # ----------------------------------------------------------------- who is there

    def instance_ids(self) -> list[int]:
        """The ids of the instances that can serve, ascending.

        Those that left the registry as a wipe would take them stay until they fail to answer a probe, which
        is sent at once and takes a second at most: an emptied registry never empties this list.
        """
        return sorted(member.instance_id for member in self._view if member.listed)

    def instances(self) -> list[Instance]:
        """The same instances, ordered by id."""
        return _by_id(member.instance for member in self._view if member.listed)

    def confirmed_instances(self) -> list[Instance]:
        """Those of them that are in the registry, or have answered since they vanished from it."""
        return _by_id(member.instance for member in self._view if member.confirmed)

    def known_ids(self) -> list[int]:
        """The ids of all instances that have not left, ascending: also of those that are down or hang, which
        may be back in a moment with all that they hold."""
        return sorted(member.instance_id for member in self._view)

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when other instances can be chosen than now, or after `timeout_s`. One that could not be
        chosen anyway leaves unnoticed: look again in the end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._view.wait_for_change()

    def wait_for_instances(self, timeout_s: float | None = None) -> asyncio.Task[list[int]]:
        """Wait until an instance can be chosen; answer the ids. The log says each 5 s what is waited for.

        Raises NoInstances after `timeout_s`, and at once when the runtime shuts down.
        """
        return started(self._wait_for_instances(timeout_s))

    async def _wait_for_instances(self, timeout_s: float | None) -> list[int]:
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                while not self._view.candidates:
                    if self._view.is_ending:
                        raise NoInstances(f"no instance of {self._view.name} before the shutdown")
                    try:
                        async with asyncio.timeout(WAIT_SAID_S):
                            await self._view.wait_for_change()
                    except TimeoutError:
                        waited_s = time.monotonic() - began_at
                        log.warning("%s, waiting since %.0f s", self._missing(), waited_s)
        except TimeoutError:
            raise NoInstances(f"no instance of {self._view.name} within {timeout_s} s") from None
        return self.instance_ids()

    def _missing(self) -> str:
        """Say why there is no instance to choose."""
        if not len(self._view):
            return f"no instance of {self._view.name} is registered"
        return f"none of the {len(self._view)} known instances of {self._view.name} can be chosen"

    async def aclose(self) -> None:
        """End this client's part in the watch of the endpoint. Calls under way go on."""
        await self._release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


def _by_id(instances: Iterable[Instance]) -> list[Instance]:
    return sorted(instances, key=lambda instance: instance.instance_id)
