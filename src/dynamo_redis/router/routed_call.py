"""A call to the worker that a `Chooser` has chosen. The booking of the request ends with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dynamo_redis.errors import NoInstances, PlaneError
from dynamo_redis.planes.context import Context
from dynamo_redis.router.base import Chooser, RoutingRequest, WorkerChoice
from dynamo_redis.runtime.annotated import Annotated
from dynamo_redis.runtime.call import Call
from dynamo_redis.runtime.discovery import Member
from dynamo_redis.runtime.dispatch import Dispatcher
from dynamo_redis.runtime.route import Hop
from dynamo_redis.runtime.selection import Only
from dynamo_redis.wire.frame import Packed

OnItem = Callable[[RoutingRequest, WorkerChoice, Any], bool]
"""Called with each item of an answer, and the choice that led there, until it returns True."""


class BookedRoute:
    """A `Route` whose instances a `Chooser` chooses. Each choice is booked, until `ended`.

    A request that fails before its first item is booked anew, on another instance. (An instance that refused
    the request because of an old secret gets it again, with the new secret. That try is not booked: the
    booking ended with the refusal.)
    """

    __slots__ = ("_chooser", "_dispatcher", "choice", "routing")

    def __init__(
        self, dispatcher: Dispatcher, chooser: Chooser, routing: RoutingRequest, choice: WorkerChoice
    ) -> None:
        self._dispatcher = dispatcher
        self._chooser = chooser
        self.routing = routing
        self.choice = choice
        """The last choice: the worker, and the blocks that it was expected to hold."""

    def hop(self, request: dict[str, Any]) -> Hop:
        """Return the instance chosen last, and the request with the rank chosen as `dp_rank`. Raises
        NoInstances if the instance has left."""
        instance_id, dp_rank = self.choice.worker
        member = self._dispatcher.view.get(instance_id)
        if member is None:
            raise NoInstances(f"instance {instance_id:x} left as it was chosen")
        return Hop(self._dispatcher, member, {**request, "dp_rank": dp_rank})

    def note_first_item(self) -> None:
        """Note that the worker has read the prompt."""
        self._chooser.prefill_done(self.routing.request_id)
        self.routing = replace(self.routing, hashes=())  # they are long, and not needed again

    # ----------------------------------------------------------------- the route

    def failed(self, member: Member, error: PlaneError, *, was_answered: bool) -> bool:
        """As `Route.failed`."""
        self._dispatcher.note_failure(member, error)
        return True

    async def choose_again(self, tried: set[int], request: Any) -> Hop:
        """As `Route.choose_again`."""
        self.choice = await self._chooser.choose(replace(self.routing, excluded=tried))
        try:
            return self.hop(request.value() if isinstance(request, Packed) else request)
        except NoInstances:
            self.ended()
            raise

    def ended(self) -> None:
        """End the booking. Idempotent."""
        self._chooser.free(self.routing.request_id)


class RoutedCall(Call):
    """A `Call` along a `BookedRoute`. With the first item the prompt's tokens are booked no more. The booking
    ends with the call, also if the call fails or is cancelled."""

    __slots__ = ("_booked", "_has_item", "_on_item")

    def __init__(
        self,
        route: BookedRoute,
        hop: Hop,
        annotated: bool,
        context: Context | None,
        *,
        on_item: OnItem,
    ) -> None:
        """Send the request to `hop`. Raises as `Call`; the caller ends the booking then."""
        self._booked = route
        self._has_item = False
        self._on_item: OnItem | None = on_item
        super().__init__(
            hop.dispatcher,
            Only(hop.member.instance_id),
            hop.request,
            annotated,
            context,
            member=hop.member,
            route=route,
        )

    @property
    def choice(self) -> WorkerChoice:
        """The worker that the request is at, and the blocks that it was expected to hold."""
        return self._booked.choice

    async def __anext__(self) -> Any:
        item = await Call.__anext__(self)
        if not self._has_item:
            self._has_item = True
            self._booked.note_first_item()
        self._show(item)
        return item

    async def next_items(self) -> list[Any]:
        """See `Call.next_items`."""
        items = await Call.next_items(self)
        for item in items[1:]:
            if self._on_item is None:
                break
            self._show(item)
        return items

    def _show(self, item: Any) -> None:
        """Call `on_item` with the item, unless it has returned True before."""
        if self._on_item is not None:
            content = item.data() if isinstance(item, Annotated) else item
            if self._on_item(self._booked.routing, self._booked.choice, content):
                self._on_item = None
