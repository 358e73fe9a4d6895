"""A call whose worker a `Chooser` has chosen, and whose booking ends with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dynamo_redis.errors import NoInstances
from dynamo_redis.planes.context import Context
from dynamo_redis.router.base import Choice, Chooser, RoutingRequest
from dynamo_redis.runtime.annotated import Annotated
from dynamo_redis.runtime.call import Call
from dynamo_redis.runtime.discovery import Member
from dynamo_redis.runtime.dispatch import Dispatcher
from dynamo_redis.runtime.selection import Only
from dynamo_redis.wire.frame import Packed

OnItem = Callable[[RoutingRequest, Choice, Any], bool]
"""Told of an answer's items, with the choice that led there, until it says that it has heard enough."""


class RoutedCall(Call):
    """As `Call`. The first item says that the prompt is read; however the call ends, its booking does too.

    A request that fails before its first item is booked anew, on another instance. (One that an instance
    refused because of an old secret goes there again with the new one, and is booked nowhere: its booking
    ended with the refusal.)
    """

    __slots__ = ("_begun", "_chooser", "_on_item", "_routing", "choice")

    def __init__(
        self,
        dispatcher: Dispatcher,
        chooser: Chooser,
        routing: RoutingRequest,
        choice: Choice,
        request: dict[str, Any],
        annotated: bool,
        context: Context | None,
        *,
        on_item: OnItem,
    ) -> None:
        """Send the request to the worker chosen, with its rank as `dp_rank`. Raises what `Call` raises; the
        booking has ended then."""
        self._stream = None
        self._chooser = chooser
        self._routing = routing
        self.choice = choice
        """The worker that the request is at, and what it was thought to hold."""
        self._begun = False
        self._on_item: OnItem | None = on_item
        instance_id, dp_rank = choice.worker
        try:
            member = dispatcher.view.get(instance_id)
            if member is None:
                raise NoInstances(f"instance {instance_id:x} left as it was chosen")
            super().__init__(
                dispatcher,
                Only(instance_id),
                {**request, "dp_rank": dp_rank},
                annotated,
                context,
                member=member,
            )
        except BaseException:
            chooser.free(routing.request_id)
            raise

    async def __anext__(self) -> Any:
        item = await Call.__anext__(self)
        if not self._begun:
            self._begun = True
            self._chooser.prefill_done(self._routing.request_id)
            self._routing = replace(self._routing, hashes=())  # long, and needed no more
        if self._on_item is not None:
            content = item.data() if isinstance(item, Annotated) else item
            if self._on_item(self._routing, self.choice, content):
                self._on_item = None
        return item

    def _close(self) -> None:
        if self._stream is not None:
            self._chooser.free(self._routing.request_id)
        super()._close()

    def _pass_over(self) -> None:
        self._chooser.free(self._routing.request_id)

    async def _choose_again(self, tried: set[int]) -> Member:
        routing = replace(self._routing, excluded=tried)
        self.choice = await self._chooser.choose(routing)
        instance_id, dp_rank = self.choice.worker
        member = self._dispatcher.view.get(instance_id)
        if member is None:
            self._chooser.free(routing.request_id)
            raise NoInstances(f"instance {instance_id:x} left as it was chosen")
        request = self._request.value() if isinstance(self._request, Packed) else self._request
        self._request = {**request, "dp_rank": dp_rank}
        return member
