"""The client of an endpoint: the list of instances, and calls by several router policies."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Iterable
from contextlib import suppress
from typing import Any, Final, Self

from dynamo_redis.errors import NoInstances, PlaneError
from dynamo_redis.names import format_instance_id
from dynamo_redis.planes.base import RequestPlaneClient
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.awaitables import failed, started
from dynamo_redis.runtime.call import Call
from dynamo_redis.runtime.discovery import EndpointView, Member
from dynamo_redis.runtime.dispatch import Dispatcher
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.selection import Only, Policy, policy
from dynamo_redis.runtime.service import SCRAPE_S, ask_all

log = logging.getLogger(__name__)

WAIT_LOG_INTERVAL_S = 5.0
"""Seconds between two warnings while a client waits for an instance."""
_NOTHING: Final = object()


class Client:
    """Sends requests to the instances of one endpoint.

    Each call chooses an instance and sends the request at once. Await the call, then iterate over the answer:

        async for item in await client.round_robin({"prompt": "hi"}, annotated=False):
            ...

    Until its first item has arrived, a request that fails with a retryable error is sent to another instance,
    to each at most once; after the first item the error is raised. Errors are `PlaneError`s; `NoInstances` is
    raised at once if no instance is known. To leave the iteration early, or to drop the iterator, kills the
    request at the worker. Items are `Annotated` (`.data()`), or plain with `annotated=False`, where None is
    left out.
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
        self._plane_client = plane_client
        self.dispatcher = Dispatcher(view, plane_client)
        """For callers that choose an instance by themselves and send as this client does."""
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
        """Call this one instance, and no other if it fails.

        The call fails with NoInstances if it is not known.
        """
        if self._view.get(instance_id) is None:
            return failed(NoInstances(self._view.absence(instance_id)))
        return self._call(Only(instance_id), request, annotated, context)

    async def bidirectional(
        self,
        messages: AsyncIterable[Any],
        annotated: bool | None = True,
        context: Context | None = None,
        *,
        instance_id: int | None = None,
    ) -> Call:
        """Send a stream of messages to an endpoint of `serve_bidirectional_endpoint`, and return its answer.

        The request begins with the first message. It is sent to one instance, chosen by the client's router
        mode or named by `instance_id`, and is not repeated if that fails. Raises NoInstances, and ValueError
        without a message. The answer is read and ended as that of the other calls.
        """
        source = aiter(messages)
        first = await anext(source, _NOTHING)
        if first is _NOTHING:
            raise ValueError("a request has at least one message")
        select = self._default if instance_id is None else Only(instance_id)
        return Call(self.dispatcher, select, first, bool(annotated), context, messages=source)

    def _call(
        self,
        select: Policy,
        request: Any,
        annotated: bool | None,
        context: Context | None,
        among: Collection[int] | None = None,
    ) -> asyncio.Future[Call]:
        """Send the request before this returns.

        An error of the sending is raised when the future is awaited.
        """
        try:
            call = Call(self.dispatcher, select, request, bool(annotated), context, among)
        except Exception as exc:  # noqa: BLE001 - raised where it is awaited
            return failed(exc)
        future: asyncio.Future[Call] = asyncio.get_running_loop().create_future()
        future.set_result(call)
        return future

    # ----------------------------------------------------------------- instances

    def instance_ids(self) -> list[int]:
        """Return the ids of the instances that can serve, ascending.

        Instances whose records vanished together, as in a wipe of Redis, are probed at once. Each stays in
        the list until it has failed a probe, which takes a second at most. An emptied registry alone never
        empties the list.
        """
        return sorted(member.instance_id for member in self._view if member.listed)

    def instances(self) -> list[Instance]:
        """Return the instances of `instance_ids`, ordered by id."""
        return _by_id(member.instance for member in self._view if member.listed)

    def confirmed_instances(self) -> list[Instance]:
        """Return those of `instances` that are in the registry, or have answered since they vanished from
        it."""
        return _by_id(member.instance for member in self._view if member.confirmed)

    def members(self) -> list[Member]:
        """Return all instances that have not left, in any state, each with its state and load as this process
        knows them. Members change with the view."""
        return list(self._view)

    def known_ids(self) -> list[int]:
        """Return the ids of all instances that have not left, ascending.

        Instances that are down or hang are included: they may be back in a moment, with their KV caches.
        """
        return sorted(member.instance_id for member in self._view)

    @property
    def wrong_plane(self) -> str | None:
        """The reason if all known instances serve other request planes than this client; else None."""
        return self._view.wrong_plane

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until the set of instances that can be chosen changes, or `timeout_s` has passed.

        The departure of an instance that could not be chosen is no such change: read the list again after the
        time-out.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._view.wait_for_change()

    async def scrape_stats(self, timeout_s: float = SCRAPE_S) -> list[dict[str, Any]]:
        """Ask all instances at once for their stats of this endpoint.

        Each answer has the form of a NATS service's (ADR-32): `id`, `version`, `started`, and `endpoints`
        with `num_requests`, `num_errors`, `processing_time` and `average_processing_time` in nanoseconds,
        `data` of the endpoint's stats handler, and beside it `in_flight`, `p50_processing_time` and
        `p99_processing_time`. An instance that does not answer within `timeout_s` has `id` and `error`
        instead.
        """
        targets = [member.target for member in self._view if member.listed]
        answers = await ask_all(
            self._plane_client, targets, "stats", endpoint=str(self._view.name), timeout_s=timeout_s
        )
        return [
            {"id": format_instance_id(instance_id), "error": str(answer.found)}
            if isinstance(answer.found, PlaneError)
            else answer.found
            for instance_id, answer in sorted(answers.items())
        ]

    def wait_for_instances(self, timeout_s: float | None = None) -> asyncio.Task[list[int]]:
        """Wait until an instance can be chosen; return the ids. Every 5 s the log says why none can be.

        Raises NoInstances after `timeout_s`, and at once when the runtime shuts down.
        """
        return started(self._wait_for_instances(timeout_s))

    async def _wait_for_instances(self, timeout_s: float | None) -> list[int]:
        view = self._view
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                while not view.candidates:
                    if view.is_ending:
                        raise NoInstances(f"no instance of {view.name} before the shutdown")
                    try:
                        async with asyncio.timeout(WAIT_LOG_INTERVAL_S):
                            await view.wait_for_change()
                    except TimeoutError:
                        waited_s = time.monotonic() - began_at
                        log.warning("%s (waiting since %.0f s)", view.absence(), waited_s)
        except TimeoutError:
            raise NoInstances(f"no instance within {timeout_s} s: {view.absence()}") from None
        return self.instance_ids()

    async def aclose(self) -> None:
        """Release the endpoint's view, which its clients share. Calls under way go on."""
        await self._release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


def _by_id(instances: Iterable[Instance]) -> list[Instance]:
    return sorted(instances, key=lambda instance: instance.instance_id)
