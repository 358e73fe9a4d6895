"""The way of one call from instance to instance, for callers that choose by other means than a policy."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from dynamo_redis.errors import PlaneError
from dynamo_redis.runtime.discovery import Member
from dynamo_redis.runtime.dispatch import Dispatcher


class Hop(NamedTuple):
    """The next instance of a call, the dispatcher that reaches it, and the request as it gets it."""

    dispatcher: Dispatcher
    member: Member
    request: Any


class Route(Protocol):
    """Chooses the instances that one call is sent to after its first one.

    The call tells it of each failure, and of the end of each instance's part in the call.
    """

    def failed(self, member: Member, error: PlaneError, *, was_answered: bool) -> bool:
        """Note that an instance failed; return whether another one may be tried.

        `was_answered` is True if an item had come from it. A PlaneError raised here is raised to the reader
        in place of `error`.
        """
        ...

    async def choose_again(self, tried: set[int], request: Any) -> Hop:
        """Choose another instance than those tried. Raises NoInstances.

        `request` is as it was sent last: the object itself, or a `Packed`.
        """
        ...

    def ended(self) -> None:
        """Note that the instance chosen last has no more part in the call: its answer is over, or it is not
        used. Called once or more for each choice."""
        ...
