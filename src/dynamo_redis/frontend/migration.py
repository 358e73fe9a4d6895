"""Migration: an answer whose worker is lost goes on at another one, and its client sees one answer.

The next worker gets the tokens so far at the end of the prompt, and the rest of the budget of tokens. An
answer is not moved if the lost worker had more state than its tokens, as for guided decoding.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

from dynamo_redis.errors import (
    CannotConnect,
    DeadlineExceeded,
    Draining,
    EndpointNotFound,
    NoInstances,
    Overloaded,
)
from dynamo_redis.frontend.answers import AnswerDecoder
from dynamo_redis.frontend.model import Answer, Generate
from dynamo_redis.models.llm_protocol import GenerateRequest, StopConditions
from dynamo_redis.planes.context import Context

WAIT_S: Final = 10.0
"""Longest wait for a worker that can go on with an answer, while there is none at all, in seconds."""

_NOT_TAKEN: Final = (NoInstances, CannotConnect, Draining, EndpointNotFound)
"""Errors of a request that no worker has begun."""

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0


class Migration:
    """The migrations of one answer: at most `limit`, and none beyond `max_length` tokens of prompt and answer
    together."""

    __slots__ = (
        "_excluded",
        "_left",
        "_max_length",
        "_pause_s",
        "_request",
        "_waits_until",
        "count",
        "request",
    )

    def __init__(self, request: GenerateRequest, limit: int, max_length: int | None) -> None:
        self._request = request
        self._left = limit
        self._max_length = max_length
        self._excluded: set[int] = set()
        self._pause_s = _FIRST_PAUSE_S
        self._waits_until: float | None = None
        self.request = request
        """The request to the next worker."""
        self.count = 0
        """The number of migrations since the beginning of the answer."""

    def may_move(self, answer: AnswerDecoder) -> bool:
        """Return whether the answer can go on at another worker."""
        token_ids = answer.token_ids
        if not self._left or token_ids is None or not can_move(self._request):
            return False
        length = len(self._request["token_ids"]) + len(token_ids)
        return self._max_length is None or length <= self._max_length

    def is_whole(self, answer: AnswerDecoder) -> bool:
        """Return whether all tokens of the answer have come, and only its end is missing."""
        max_tokens = self._request["stop_conditions"].get("max_tokens")
        return max_tokens is not None and answer.token_ids is not None and len(answer.token_ids) >= max_tokens

    def move(self, answer: AnswerDecoder, lost_at: int | None) -> None:
        """Make the request for the rest of the answer. `lost_at` is the instance that was lost."""
        assert answer.token_ids is not None
        self._left -= 1
        self.count += 1
        self._pause_s, self._waits_until = _FIRST_PAUSE_S, None
        if lost_at is not None:
            self._excluded.add(lost_at)
        answered = answer.token_ids
        stop: StopConditions = {**self._request["stop_conditions"]}
        if "max_tokens" in stop:
            stop["max_tokens"] -= len(answered)
        if "min_tokens" in stop:
            stop["min_tokens"] = max(stop["min_tokens"] - len(answered), 0)
        self.request = {
            **self._request,
            "token_ids": [*self._request["token_ids"], *answered],
            "stop_conditions": stop,
            "answered_count": len(answered),
        }
        answer.note_move()

    def restart(self) -> None:
        """Forget the answer so far: another worker answers the whole request. No limit begins anew."""
        self.request = self._request
        self.count = 0

    async def send(self, send: Generate, context: Context) -> Answer:
        """Send the request. After a migration the instances that were lost are asked only if there are no
        others. Raises PlaneError."""
        try:
            return await send(self.request, context, self._excluded)
        except NoInstances:
            if not self._excluded:
                raise
            return await send(self.request, context, ())

    async def may_try_again(self, error: Exception, context: Context) -> bool:
        """Return whether the rest of an answer may be sent again, after a pause, since no worker took it.

        Waits for a worker that can be reached for `WAIT_S`, and for room at workers that are full for as long
        as the request may take. Raises DeadlineExceeded if its deadline comes first.
        """
        if not self.count or not isinstance(error, (Overloaded, *_NOT_TAKEN)) or context.is_stopped():
            return False
        now = asyncio.get_running_loop().time()
        if self._waits_until is None:
            self._waits_until = now + WAIT_S
        if isinstance(error, _NOT_TAKEN) and now + self._pause_s > self._waits_until:
            return False
        left_s = context.remaining_s()
        if left_s is not None and left_s <= self._pause_s:
            await asyncio.sleep(max(left_s, 0.0))
            raise DeadlineExceeded("no worker went on with the answer before the deadline") from error
        await asyncio.sleep(self._pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return True


def can_move(request: GenerateRequest) -> bool:
    """Return whether the tokens of an answer are all that another worker needs to go on with it."""
    return (
        not request["sampling_options"].get("guided_decoding")
        and "chat" not in request  # its engine makes the prompt, and would not go on behind tokens
        and request["stop_conditions"].get("max_thinking_tokens") is None
    )
