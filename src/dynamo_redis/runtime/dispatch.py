"""The way from a client to an instance: choose it, send to it, and report its failures to the view."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

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
    """One endpoint's view and the plane that carries its requests; shared by a client's calls."""

    __slots__ = ("__weakref__", "_picked", "open", "view")

    def __init__(self, view: EndpointView, plane_client: RequestPlaneClient) -> None:
        self.view = view
        self.open = plane_client.open
        """See `RequestPlaneClient.open`."""
        self._picked: tuple[list[Member], frozenset[int], list[Member]] | None = None

    def choose(
        self, select: Policy, tried: set[int] | None = None, among: Collection[int] | None = None
    ) -> Member:
        """Choose an instance of `among` that has not been tried: a candidate, else a last resort.

        Raises NoInstances if there is none.
        """
        view, among = self.view, ids_now(among)
        if not tried and (members := self._candidates(among)):
            try:
                return select(members)
            except NoInstances:
                pass  # the wanted instance is a last resort, or not known
        for members in (view.candidates, *view.last_resorts()):
            allowed = [
                member
                for member in members
                if (among is None or member.instance_id in among)
                and (not tried or member.instance_id not in tried)
            ]
            if allowed:
                with suppress(NoInstances):  # the wanted instance may be in a later list
                    return select(allowed)
        raise NoInstances(view.absence())

    def _candidates(self, among: Collection[int] | None) -> list[Member]:
        """Return the candidates with those ids.

        The last result is kept: most requests have the ids of the last one.
        """
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
        """Report a failed request to the view: its instance is down, leaving, or fails requests."""
        if isinstance(error, _DOWN):
            self.view.mark_down(member, error)
        elif isinstance(error, _LEAVING):
            self.view.mark_down(member, error, probe=False)
        elif isinstance(error, HandlerFailed):
            self.view.note_failing(member, error)

    async def refreshed(self, member: Member) -> Member | None:
        """Read the member's record again; return the new member if the process changed, else None."""
        try:
            current = await self.view.refresh(member)
        except StoreError:
            return None
        return current if current is not member else None
