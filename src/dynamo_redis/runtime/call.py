"""One request on its way: sent to an instance, and to another one while nothing has been answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Collection
from typing import Any, Self

from dynamo_redis.errors import (
    AuthenticationFailed,
    ConnectionLost,
    DeadlineExceeded,
    EngineFailed,
    NoInstances,
    NotAccepted,
    Overloaded,
    PeerSilent,
    PlaneError,
    RequestCancelled,
)
from dynamo_redis.planes.base import ResponseStream
from dynamo_redis.planes.context import Context, Strength
from dynamo_redis.runtime.annotated import Annotated
from dynamo_redis.runtime.discovery import Member
from dynamo_redis.runtime.dispatch import Dispatcher
from dynamo_redis.runtime.route import Route
from dynamo_redis.runtime.selection import Policy

_MAX_REFUSED_TRIES = 3
"""Most instances that may refuse one request, or whose engines may fail with it. More tries would add load to
a deployment that is overloaded already; and a request that fails in three engines may be the cause itself."""

_MAX_LOST_TRIES = 3
"""Most instances that may be lost with one request: the request may be what kills them."""

_MAX_SILENT_TRIES = 2
"""Most instances that may fall silent with one request: the request may be what makes them hang."""


class Call:
    """One request and its answer, across the instances that it is tried on. It has one reader at a time.

    A read that is cancelled, for instance by a time-out, loses no item: the next read gets it. `aclose`,
    leaving `async with`, or dropping the call ends it early; the worker is told to kill the request.
    """

    __slots__ = (
        "_among",
        "_annotated",
        "_answered",
        "_context",
        "_dispatcher",
        "_error",
        "_failures",
        "_member",
        "_messages",
        "_request",
        "_route",
        "_select",
        "_stream",
        "_was_read",
        "resent_count",
    )

    def __init__(
        self,
        dispatcher: Dispatcher,
        select: Policy,
        request: Any,
        annotated: bool,
        context: Context | None,
        among: Collection[int] | None = None,
        *,
        member: Member | None = None,
        route: Route | None = None,
        messages: AsyncIterable[Any] | None = None,
    ) -> None:
        """Send the request to `member`, or to an instance that `select` chooses.

        After a failure `route` chooses the next instance; without a route, `select` does, `among` these ids.
        A request that `messages` follow is sent once: they cannot be read again.
        Raises NoInstances, and the errors of `RequestPlaneClient.open`.
        """
        self._stream: ResponseStream | None = None
        self._was_read = False
        self._dispatcher = dispatcher
        self._select = select
        self._among = among
        self._route = route
        self._request = request
        self._messages = messages
        self._annotated = annotated
        self._context = context
        self._answered = False
        self._error: PlaneError | None = None
        self._failures: _Failures | None = None
        self.resent_count = 0
        """How often the request was sent to another instance after a failure."""
        self._member: Member
        self._open(dispatcher.choose(select, None, among) if member is None else member)

    @property
    def instance_id(self) -> int:
        """The instance that the request is at, or was at last."""
        return self._member.instance_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        self._was_read = True
        while True:
            if (stream := self._stream) is None:
                if self._error is None:
                    raise StopAsyncIteration
                await self._send_again(self._error)
                continue
            try:
                item = await stream.__anext__()
            except PlaneError as error:
                self._close()
                self._request = stream.packed
                if not self._may_send_again(error, was_sent=stream.sent):
                    raise  # no variable keeps the error: its traceback would keep this frame, and so the call
                self._error = error.with_traceback(None)
            except StopAsyncIteration:
                self._close()
                raise
            except Exception:
                if stream.is_over:  # else a second reader made the error, and the first one goes on
                    self._close()
                raise
            else:
                if not self._answered:
                    self._on_answered(stream)
                if self._annotated or item is not None:
                    return Annotated(item) if self._annotated else item

    async def next_items(self) -> list[Any]:
        """Wait for the next item; return it and all that have come behind it. Empty at the end."""
        try:
            items = [await self.__anext__()]
        except StopAsyncIteration:
            return []
        stream = self._stream
        if stream is not None:
            ready = stream.take_ready()
            items += (
                map(Annotated, ready) if self._annotated else (item for item in ready if item is not None)
            )
            if stream.is_over:
                self._close()
        return items

    @property
    def is_over(self) -> bool:
        """True once the answer has ended: no more items and no error come."""
        return self._stream is None and self._error is None

    async def aclose(self) -> None:
        """End the call; the worker is told to kill it if it is still under way."""
        stream, self._error = self._stream, None
        if stream is not None:
            self._close()
            await stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._stream is not None:
            self._stream.call_soon(self._drop)

    def _drop(self) -> None:
        """End the answer of a call that was dropped. If it was read in part the worker is told to stop; if it
        was never read, the worker still does what the request asks for."""
        stream = self._stream
        if stream is not None:
            self._close()
            if self._was_read:
                stream.fail(ConnectionLost("the response was dropped by its reader"))
            else:
                stream.abandon()

    # ----------------------------------------------------------------- inner steps

    def _open(self, member: Member) -> None:
        self._stream = stream = self._dispatcher.open(
            member.target, self._request, self._context, messages=self._messages
        )
        self._request = None  # the stream has it, packed: the caller may reuse its object
        self._error = None
        self._member = member
        member.in_flight += 1
        member.pending.add(stream)

    def _on_answered(self, stream: ResponseStream) -> None:
        """Note that the request stays where it is from now on."""
        member = self._member
        member.pending.discard(stream)
        member.failures.end()
        self._answered = True
        stream.forget_request()
        if stream.is_over:  # an answer of one item is complete with it
            self._close()

    def _close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            if self._route is not None:
                self._route.ended()
            self._member.in_flight -= 1
            if not self._answered:
                self._member.pending.discard(stream)

    def _may_send_again(self, error: PlaneError, *, was_sent: bool) -> bool:
        """Note a failure; return whether the request may be sent again after it."""
        failed = self._member
        if self._route is None:
            self._dispatcher.note_failure(failed, error)
        elif not self._route.failed(failed, error, was_answered=self._answered):
            return False
        is_stopped = self._context is not None and self._context.is_stopped()
        if self._answered or not error.retryable or is_stopped or self._messages is not None:
            return False
        if self._failures is None:
            self._failures = _Failures()
        if isinstance(error, AuthenticationFailed) and not self._failures.refreshed:
            return True
        self._failures.add(failed, error, was_sent=was_sent)
        return not self._failures.suffice_after(error)

    async def _send_again(self, error: PlaneError) -> None:
        """Open the request at another instance, or raise `error` if there is none.

        A read may be cancelled in here: the next one comes back.
        """
        failures = self._failures
        assert failures is not None
        if failures.searching:
            raise RuntimeError("an answer has one reader")
        failures.searching = True
        try:
            following = await self._find_another_in_time(error, failures)
            if self._error is None:  # the call was closed meanwhile
                self._pass_over()
                return
            if following is None:
                self._error = None
                raise error
            self.resent_count += 1
            self._open(following)
        finally:
            failures.searching = False
            del error  # else the error and this frame would keep each other alive

    async def _find_another_in_time(self, error: PlaneError, failures: _Failures) -> Member | None:
        """Do as `_find_another`, until the context ends the request: then raise DeadlineExceeded, or
        RequestCancelled if it is stopped or killed."""
        context = self._context
        if context is None:
            return await self._find_another(error, failures)
        limit = asyncio.timeout(context.remaining_s())

        def end_now(_: Strength) -> None:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())

        try:
            async with limit:
                unsubscribe = context.on_cancel(end_now)
                try:
                    return await self._find_another(error, failures)
                finally:
                    unsubscribe()
        except TimeoutError:
            if not limit.expired():
                raise
            self._error = None
            if context.is_stopped():
                raise RequestCancelled("the request was cancelled before it was sent again") from error
            raise DeadlineExceeded("the request's deadline passed") from error
        finally:
            del error  # as in `_send_again`

    async def _find_another(self, error: PlaneError, failures: _Failures) -> Member | None:
        """Return the next instance, or None. If the last one refused an old secret and its record has a new
        one, that is the same instance again."""
        failed = self._member
        if isinstance(error, AuthenticationFailed):
            if not failures.refreshed:  # once a request
                fresh = await self._dispatcher.refreshed(failed)
                failures.refreshed = True
                if fresh is not None:
                    return fresh
            self._dispatcher.view.mark_down(failed, error)
            failures.add(failed, error, was_sent=False)
        if failures.lost:
            answering = await self._find_answering(failures.tried)
            if answering is not None:
                return answering
        try:
            return await self._choose_again(failures.tried)
        except NoInstances:
            return None

    async def _find_answering(self, tried: set[int]) -> Member | None:
        """Find an instance that answers a probe now: where one was lost, others may be lost as well."""
        passed_over = set(tried)
        while True:
            try:
                chosen = await self._choose_again(passed_over)
            except NoInstances:
                return None
            answers = False
            try:
                answers = await self._dispatcher.view.answers_probe(chosen)
            finally:
                if not answers:
                    self._pass_over()
            if answers:
                return chosen
            passed_over.add(chosen.instance_id)

    def _pass_over(self) -> None:
        """Note that the instance that `_choose_again` chose last is not used."""
        if self._route is not None:
            self._route.ended()

    async def _choose_again(self, tried: set[int]) -> Member:
        """Choose another instance than those tried. Raises NoInstances."""
        if self._route is None:
            return self._dispatcher.choose(self._select, tried, self._among)
        hop = await self._route.choose_again(tried, self._request)
        self._dispatcher, self._request = hop.dispatcher, hop.request
        return hop.member


class _Failures:
    """The instances that have failed one request, by how they failed."""

    __slots__ = ("lost", "refreshed", "searching", "silent", "tried")

    def __init__(self) -> None:
        self.tried: set[int] = set()
        self.lost: set[int] = set()
        self.silent: set[int] = set()
        self.refreshed = False
        self.searching = False

    def add(self, member: Member, error: PlaneError, *, was_sent: bool) -> None:
        """Note that an instance did not answer."""
        self.tried.add(member.instance_id)
        if was_sent and isinstance(error, ConnectionLost | NotAccepted):
            self.lost.add(member.instance_id)
        if was_sent and isinstance(error, PeerSilent | NotAccepted):
            self.silent.add(member.instance_id)

    def suffice_after(self, error: PlaneError) -> bool:
        """Return whether the request has been tried often enough. Raises PeerSilent if too many instances
        fell silent with it."""
        if isinstance(error, Overloaded | EngineFailed) and len(self.tried) >= _MAX_REFUSED_TRIES:
            return True
        if len(self.silent) >= _MAX_SILENT_TRIES:
            raise PeerSilent(
                f"{len(self.silent)} instances fell silent with this request, which may be the cause; it is "
                f"sent to no other: {error}"
            ) from error
        return len(self.lost) >= _MAX_LOST_TRIES
