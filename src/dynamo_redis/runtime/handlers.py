"""Adapters from the handlers of user code to the handlers that a request plane calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dynamo_redis.errors import InvalidRequest
from dynamo_redis.planes.base import Handler

AnyHandler = Callable[..., Any]
"""An async generator function or a coroutine function that takes `(request)`, `(request, context)`, or
`context` as a keyword. A bound method or a callable object, too."""

H = TypeVar("H", bound=AnyHandler)


def adapt(handler: AnyHandler) -> Handler:
    """Return the handler as a function of `(request, context)`. Raises TypeError if it takes no request."""
    parameters = inspect.signature(handler).parameters
    if "context" in parameters and list(parameters).index("context") != 0:
        return lambda request, context: handler(request, context=context)
    positional = [
        p
        for p in parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if not positional:
        raise TypeError(f"{handler!r} must take a request: `async def {handler.__name__}(request)`")
    takes_context = sum(p.default is p.empty or p.kind is p.VAR_POSITIONAL for p in positional) >= 2
    if takes_context:
        return handler
    return lambda request, context: handler(request)


def dynamo_endpoint(request_type: type[Any], response_type: type[Any]) -> Callable[[H], AnyHandler]:
    """Declare a handler's request and item types: pydantic models, or plain types such as `str`.

    With a model as `request_type` the request, which may be a JSON string, is validated before the handler
    runs; if it is not valid, the call ends with `InvalidRequest`, which names the field. With any other type
    the handler gets the request unchanged. Items that are models are sent as plain values. `response_type`
    documents the items and has no effect.
    """
    is_model = inspect.isclass(request_type) and issubclass(request_type, BaseModel)

    def validate(request: Any) -> Any:
        if not is_model:
            return request
        try:
            if isinstance(request, str | bytes):
                return request_type.model_validate_json(request)
            return request_type.model_validate(request)
        except ValidationError as exc:
            error = exc.errors(include_url=False)[0]
            where = ".".join(map(str, error["loc"])) or "request"
            raise InvalidRequest(f"{where}: {error['msg']}") from exc

    def decorate(handler: H) -> AnyHandler:
        # A method's first argument is the object; the request comes after it.
        position = 1 if next(iter(inspect.signature(handler).parameters), "") == "self" else 0

        @functools.wraps(handler)
        def answer(*args: Any, **kwargs: Any) -> Any:
            result = handler(*args[:position], validate(args[position]), *args[position + 1 :], **kwargs)

            async def plain_items() -> AsyncIterator[Any]:
                try:
                    async for item in result:
                        yield _plain(item)
                finally:
                    if isinstance(result, AsyncGenerator):  # close it here, in the same task
                        await result.aclose()

            async def plain_item() -> Any:
                return _plain(await result)

            return plain_items() if hasattr(result, "__anext__") else plain_item()

        return answer

    return decorate


def _plain(item: Any) -> Any:
    return item.model_dump(mode="json") if isinstance(item, BaseModel) else item


async def collect_one(stream: AsyncIterator[Any]) -> Any:
    """Return the only item of a response. Raises RuntimeError if there is none, or more than one."""
    iterator = aiter(stream)
    try:
        try:
            item = await anext(iterator)
        except StopAsyncIteration:
            raise RuntimeError("the endpoint answered with no item where one was expected") from None
        try:
            await anext(iterator)
        except StopAsyncIteration:
            return item
        raise RuntimeError("the endpoint answered with several items where one was expected")
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()
