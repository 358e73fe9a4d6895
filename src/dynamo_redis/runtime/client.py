"""Calling an endpoint: choose an instance, send, and try another one while nothing has been answered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, Self

from dynamo_redis.errors import (
    AuthenticationFailed,
    CannotConnect,
    ConnectionLost,
    Draining,
    EndpointNotFound,
    NoInstances,
    NotAccepted,
    Overloaded,
    PlaneError,
    StoreError,
)
from dynamo_redis.planes.base import RequestPlaneClient, ResponseStream
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.annotated import Annotated
from dynamo_redis.runtime.discovery import EndpointView, Member
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.selection import Only, Policy, policy

_DOWN = (CannotConnect, ConnectionLost, NotAccepted)
_LEAVING = (Draining, EndpointNotFound)

_MAX_OVERLOADED_TRIES = 3
"""An overloaded deployment is not helped by each request knocking at every door."""

_MAX_LOST_TRIES = 3
"""To so many instances one request may be sent without an answer: it may be what hangs or kills them."""


class Client:
    """Sends requests to the instances of one endpoint.

    Each call is awaited, which chooses an instance and sends, and then iterated:

        async for item in await client.round_robin({"prompt": "hi"}, annotated=False):
            ...

    Until the first item has arrived, a request that fails in a retryable way goes to another instance, each
    instance at most once; afterwards its error is raised. Errors are `PlaneError`s; `NoInstances` at once if
    none is known. Leaving the iteration early kills the request at the worker, and so does dropping the
    iterator. Items are `Annotated` (`.data()`), or plain with `annotated=False`.
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
        self._release = release
        self._policies = {
            mode: policy(mode, rng) for mode in ("round_robin", "random", "p2c", "least_loaded")
        }
        self._default = policy(router_mode, rng)

    # ----------------------------------------------------------------- calls

    async def generate(
        self,
        request: Any,
        annotated: bool | None = True,
        context: Context | None = None,
        *,
        among: Collection[int] | None = None,
    ) -> Call:
        """Call an instance chosen by the client's router mode; one of the ids in `among`, if given."""
        return Call(self, self._default, request, bool(annotated), context, among)

    async def round_robin(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> Call:
        """Call the next instance in turn."""
        return Call(self, self._policies["round_robin"], request, bool(annotated), context)

    async def random(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> Call:
        """Call any instance."""
        return Call(self, self._policies["random"], request, bool(annotated), context)

    async def p2c(self, request: Any, annotated: bool | None = True, context: Context | None = None) -> Call:
        """Call the less loaded of two random instances."""
        return Call(self, self._policies["p2c"], request, bool(annotated), context)

    async def least_loaded(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> Call:
        """Call the instance with the fewest requests of this process under way."""
        return Call(self, self._policies["least_loaded"], request, bool(annotated), context)

    async def direct(
        self,
        request: Any,
        instance_id: int,
        annotated: bool | None = True,
        context: Context | None = None,
    ) -> Call:
        """Call one instance, and no other if it fails. Raises NoInstances if it is not known."""
        if self._view.get(instance_id) is None:
            raise NoInstances(
                f"instance {instance_id:x} is not among the {len(self._view)} known of {self._view.name}"
            )
        return Call(self, Only(instance_id), request, bool(annotated), context)

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

    async def wait_for_instances(self, timeout_s: float | None = None) -> list[int]:
        """Wait until an instance can be chosen; answer the ids. Raises NoInstances after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._view.candidates:
                    await self._view.wait_for_change()
        except TimeoutError:
            raise NoInstances(f"no instance of {self._view.name} within {timeout_s} s") from None
        return self.instance_ids()

    async def aclose(self) -> None:
        """End this client's part in the watch of the endpoint. Calls under way go on."""
        await self._release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    # ----------------------------------------------------------------- for Call

    def choose(
        self, select: Policy, tried: set[int] | None, among: Collection[int] | None = None
    ) -> Member | None:
        """An instance, of `among`, that has not been tried: a candidate, else a last resort, else None."""
        member = _select(select, self._view.candidates, tried, among)
        if member is not None:
            return member
        resorts = (_select(select, members, tried, among) for members in self._view.last_resorts())
        return next((member for member in resorts if member is not None), None)

    def note_failure(self, member: Member, error: PlaneError) -> None:
        """Let the view know what a failed request says about its instance."""
        if isinstance(error, _DOWN):
            self._view.mark_down(member, error)
        elif isinstance(error, _LEAVING):
            self._view.mark_down(member, error, probe=False)

    async def refreshed(self, member: Member) -> Member | None:
        """The member by a fresh record, if that differs from the one it had."""
        try:
            current = await self._view.refresh(member)
        except StoreError:
            return None
        return current if current is not member else None

    def open(self, member: Member, request: Any, context: Context) -> ResponseStream:
        """Send a request to an instance."""
        return self._plane_client.open(member.target, request, context)

    def no_instances(self) -> NoInstances:
        """The error for an endpoint that nobody serves."""
        return NoInstances(f"no instance of {self._view.name} is known: is a worker running?")


def _select(
    select: Policy, members: Sequence[Member], tried: set[int] | None, among: Collection[int] | None
) -> Member | None:
    if among is not None:
        members = [member for member in members if member.instance_id in among]
    if tried:
        members = [member for member in members if member.instance_id not in tried]
    if not members:
        return None
    try:
        return select(members)
    except NoInstances:
        return None


class Call:
    """One request and its answer, across the instances it is tried on. Iterate it once, from one task.

    `aclose`, or leaving `async with`, ends it early; the worker is told to kill the request.
    """

    __slots__ = (
        "_among",
        "_annotated",
        "_answered",
        "_client",
        "_context",
        "_lost_count",
        "_member",
        "_refreshed",
        "_request",
        "_select",
        "_stream",
        "_tried",
    )

    def __init__(
        self,
        client: Client,
        select: Policy,
        request: Any,
        annotated: bool,
        context: Context | None,
        among: Collection[int] | None = None,
    ) -> None:
        self._client = client
        self._among = among
        self._select = select
        self._request = request
        self._annotated = annotated
        self._context = context if context is not None else Context()
        self._answered = False
        self._tried: set[int] | None = None
        self._refreshed = False
        self._lost_count = 0
        self._member: Member | None = None
        self._stream: ResponseStream | None = None
        member = client.choose(select, None, among)
        if member is None:
            raise client.no_instances()
        self._open(member)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        while (stream := self._stream) is not None:
            try:
                item = await stream.__anext__()
            except StopAsyncIteration:
                self._close()
                raise
            except PlaneError as error:
                await self._retry_or_raise(error)
            except BaseException:
                self._close()
                raise
            else:
                if not self._answered:
                    self._begin()
                return Annotated(item) if self._annotated else item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the call; the worker is told to kill it if it is still under way."""
        stream = self._stream
        self._close()
        if stream is not None:
            await stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # An iterator dropped half-way: nobody will ever read the rest.
        stream = self._stream
        if stream is not None:
            self._close()
            stream.fail(ConnectionLost("the response was dropped by its reader"))

    # ----------------------------------------------------------------- inner steps

    def _open(self, member: Member) -> None:
        stream = self._client.open(member, self._request, self._context)
        self._stream = stream
        self._member = member
        member.in_flight += 1
        member.pending.add(stream)

    def _begin(self) -> None:
        """The first item is here: from now on the request stays where it is."""
        self._answered = True
        self._request = None
        if self._member is not None and self._stream is not None:
            self._member.pending.discard(self._stream)

    def _close(self) -> None:
        member, stream = self._member, self._stream
        self._member = self._stream = None
        if member is not None and stream is not None:
            member.in_flight -= 1
            member.pending.discard(stream)

    async def _retry_or_raise(self, error: PlaneError) -> None:
        member, stream = self._member, self._stream
        self._close()
        if member is None or stream is None:
            raise error
        self._client.note_failure(member, error)
        if isinstance(error, ConnectionLost | NotAccepted) and stream.sent:
            self._lost_count += 1
        if self._answered or not error.retryable or self._context.is_stopped():
            raise error
        following = await self._next(member, error)
        if following is None:
            raise error
        self._open(following)

    async def _next(self, failed: Member, error: PlaneError) -> Member | None:
        if isinstance(error, AuthenticationFailed) and not self._refreshed:
            # A worker restarted at the same address has a new secret: its record tells, once.
            self._refreshed = True
            fresh = await self._client.refreshed(failed)
            if fresh is not None:
                return fresh
        if self._tried is None:
            self._tried = set()
        self._tried.add(failed.instance_id)
        if isinstance(error, Overloaded) and len(self._tried) >= _MAX_OVERLOADED_TRIES:
            return None
        if self._lost_count >= _MAX_LOST_TRIES:
            return None
        return self._client.choose(self._select, self._tried, self._among)


def _by_id(instances: Iterable[Instance]) -> list[Instance]:
    return sorted(instances, key=lambda instance: instance.instance_id)
