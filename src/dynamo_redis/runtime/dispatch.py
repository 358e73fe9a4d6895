"""From a client to the instances of its endpoint: which one, how, and what its failure says about it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dynamo_redis.errors import (
    CannotConnect,
    ConnectionLost,
    Draining,
    EndpointNotFound,
    HandlerFailed,
    NoInstances,
    NotAccepted,
    PlaneError,
    StoreError,
)
from dynamo_redis.planes.base import RequestPlaneClient
from dynamo_redis.runtime.among import ids_now
from dynamo_redis.runtime.discovery import EndpointView, Member
from dynamo_redis.runtime.selection import Policy

_DOWN = (CannotConnect, ConnectionLost, NotAccepted)
_LEAVING = (Draining, EndpointNotFound)


class Dispatcher:
    """One endpoint's view and the plane that its requests take; shared by a client's calls."""

    __slots__ = ("__weakref__", "_picked", "open", "view")

    def __init__(self, view: EndpointView, plane_client: RequestPlaneClient) -> None:
        self.view = view
        self.open = plane_client.open
        """See `RequestPlaneClient.open`."""
        self._picked: tuple[list[Member], frozenset[int], list[Member]] | None = None

    def choose(
        self, select: Policy, tried: set[int] | None = None, among: Collection[int] | None = None
    ) -> Member:
        """An instance, of `among`, that has not been tried: a candidate, else a last resort.

        Raises NoInstances if there is none.
        """
        view, among = self.view, ids_now(among)
        if not tried and (members := self._candidates(among)):
            try:
                return select(members)
            except NoInstances:
                pass  # the one that is wanted is a last resort, if it is known at all
        for members in (view.candidates, *view.last_resorts()):
            member = _select(select, members, tried, among)
            if member is not None:
                return member
        raise NoInstances(f"no instance of {view.name} is known: is a worker running?")

    def _candidates(self, among: Collection[int] | None) -> list[Member]:
        """Return the candidates of those ids. Most requests bring the same ids as the one before."""
        candidates = self.view.candidates
        if among is None:
            return candidates
        picked = self._picked  # the view makes a new list whenever its candidates change
        if picked is None or picked[0] is not candidates or picked[1] is not among:
            members = [member for member in candidates if member.instance_id in among]
            if not isinstance(among, frozenset):
                return members
            self._picked = picked = (candidates, among, members)
        return picked[2]

    def note_failure(self, member: Member, error: PlaneError) -> None:
        """Let the view know what a failed request says about its instance."""
        if isinstance(error, _DOWN):
            self.view.mark_down(member, error)
        elif isinstance(error, _LEAVING):
            self.view.mark_down(member, error, probe=False)
        elif isinstance(error, HandlerFailed):
            self.view.note_failing(member, error)

    async def refreshed(self, member: Member) -> Member | None:
        """The member by a fresh record, if that differs from the one it had."""
        try:
            current = await self.view.refresh(member)
        except StoreError:
            return None
        return current if current is not member else None


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
