"""Adapters of user handlers."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel

from dynamo_redis.errors import InvalidRequest
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.handlers import AnyHandler, adapt, collect_one, dynamo_endpoint


class Prompt(BaseModel):
    text: str
    count: int = 2


class Word(BaseModel):
    word: str


async def answers(handler: AnyHandler, request: Any, context: Context | None = None) -> list[Any]:
    """Return the items that a plane would send."""
    answer = adapt(handler)(request, context or Context("r1"))
    if isinstance(answer, AsyncIterator):
        return [item async for item in answer]
    return [await answer]


async def takes_request(request: Any) -> AsyncIterator[Any]:
    yield request


async def takes_context(request: Any, ctx: Context) -> AsyncIterator[Any]:
    yield request, ctx.id()


async def takes_keyword(request: Any, *, context: Context) -> Any:
    return request, context.id()


async def takes_optional(request: Any, factor: int = 3) -> Any:
    return request, factor


class Worker:
    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        yield request, context.id()

    async def __call__(self, request: Any) -> Any:
        return request

    @dynamo_endpoint(Prompt, Word)
    async def words(self, request: Prompt) -> AsyncIterator[Word]:
        for _ in range(request.count):
            yield Word(word=request.text)

    @dynamo_endpoint(Prompt, Word)
    async def one(self, request: Prompt, context: Context) -> Word:
        return Word(word=f"{request.text} {context.id()}")


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (takes_request, "q"),
        (takes_context, ("q", "r1")),
        (takes_keyword, ("q", "r1")),
        (takes_optional, ("q", 3)),
        (Worker().generate, ("q", "r1")),
        (Worker(), "q"),
    ],
)
async def test_adapt_accepts_every_form_of_handler(handler: AnyHandler, expected: object) -> None:
    assert await answers(handler, "q") == [expected]


def test_handler_without_a_request_is_refused() -> None:
    async def nothing() -> None: ...

    with pytest.raises(TypeError, match="must take a request"):
        adapt(nothing)


async def test_models_are_validated_and_sent_plain() -> None:
    worker = Worker()
    assert await answers(worker.words, {"text": "hi"}) == [{"word": "hi"}, {"word": "hi"}]
    assert await answers(worker.words, '{"text": "hi", "count": 1}') == [{"word": "hi"}]
    assert await answers(worker.one, {"text": "hi"}) == [{"word": "hi r1"}]


@pytest.mark.parametrize(
    ("request_", "named"), [({"text": 5}, "text"), ({}, "text"), (None, "request"), ("{", "request")]
)
async def test_invalid_request_error_names_the_field(request_: object, named: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{named}: "):
        await answers(Worker().words, request_)


async def test_plain_types_are_not_validated() -> None:
    """As in `dynamo.runtime`, where a plain type stands for unchanged requests."""

    @dynamo_endpoint(str, str)
    async def say(request: str) -> AsyncIterator[str]:
        yield request

    assert await answers(say, "hi") == ["hi"]
    assert await answers(say, {"text": "hi"}) == [{"text": "hi"}]


async def _items(*items: int) -> AsyncIterator[int]:
    for item in items:
        yield item


async def test_collect_one_needs_exactly_one_item() -> None:
    assert await collect_one(_items(1)) == 1
    with pytest.raises(RuntimeError, match="no item"):
        await collect_one(_items())
    with pytest.raises(RuntimeError, match="several"):
        await collect_one(_items(1, 2))


async def test_declared_handler_ends_with_its_answer() -> None:
    """It ends at once, in the task that runs it, so that its resources are closed there."""
    ended_in: list[asyncio.Task[Any] | None] = []

    @dynamo_endpoint(Prompt, Word)
    async def endless(request: Prompt) -> AsyncIterator[str]:
        try:
            while True:
                yield request.text
        finally:
            await asyncio.sleep(0)
            ended_in.append(asyncio.current_task())

    answer = adapt(endless)({"text": "hi"}, Context())
    assert isinstance(answer, AsyncGenerator)
    assert await anext(answer) == "hi"
    await answer.aclose()
    assert ended_in == [asyncio.current_task()]


async def test_declared_handler_may_be_wrapped_by_a_plain_function() -> None:
    async def words(request: Prompt) -> AsyncIterator[str]:
        yield request.text

    @functools.wraps(words)
    def traced(*args: Any) -> AsyncIterator[str]:
        return words(*args)

    assert await answers(dynamo_endpoint(Prompt, str)(traced), {"text": "hi"}) == ["hi"]
