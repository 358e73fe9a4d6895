"""One request, one answer: an endpoint without a response stream."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.annotated import Annotated
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.endpoint import Endpoint
from dynamo_redis.runtime.handlers import collect_one


class UnaryClient:
    """A client of an endpoint that answers with exactly one item."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def complete(self, request: Any, *, context: Context | None = None) -> Any:
        """Call the next instance in turn and return its item.

        Raises PlaneError, and RuntimeError if the endpoint does not answer with exactly one item.
        """
        item: Annotated = await collect_one(await self._client.round_robin(request, context=context))
        return item.data()


async def serve_unary_endpoint(
    endpoint: Endpoint,
    handler: Callable[..., Awaitable[Any]],
    *,
    graceful_shutdown: bool = True,
    metrics_labels: list[tuple[str, str]] | None = None,
    health_check_payload: dict[str, Any] | None = None,
) -> None:
    """Serve a coroutine function `handler(request, *, context)` until shutdown."""

    def answer(request: Any, *, context: Context) -> Awaitable[Any]:
        return handler(request, context=context)

    await endpoint.serve_endpoint(answer, graceful_shutdown, metrics_labels, health_check_payload)
