"""The endpoints by which a router shows its state and explains its choices. Routers in frontends have them,
and router services have them, too.

| endpoint | request | answer |
|---|---|---|
| `<ns>.<component>.<endpoint>_router_state` | anything | one item, `RouterState.to_json()` |
| `<ns>.<component>.<endpoint>_best_worker` | `{"token_ids": […]}` | one item, see `describe_choice` |

`<ns>.<component>.<endpoint>` is the workers' endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dynamo_redis.names import EndpointName
from dynamo_redis.router.base import WorkerChoice
from dynamo_redis.router.prompts import token_ids_of
from dynamo_redis.router.router_state import RouterState
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.runtime.serving import ServedEndpoint


class Router(Protocol):
    """The part of `KvRouter` that the endpoints need."""

    @property
    def endpoint(self) -> EndpointName: ...
    @property
    def block_size(self) -> int: ...
    def state(self) -> RouterState: ...
    def is_blind(self) -> bool: ...
    async def best_worker(
        self, token_ids: Sequence[int], *, lora_name: str | None, request: Mapping[str, Any]
    ) -> WorkerChoice: ...


def state_endpoint(workers: EndpointName) -> EndpointName:
    """Return the endpoint at which the routers of these workers show their state."""
    return EndpointName(workers.namespace, workers.component, f"{workers.endpoint}_router_state")


def is_state_endpoint(name: EndpointName) -> bool:
    """Return whether a router shows its state at this endpoint."""
    return name.endpoint.endswith("_router_state")


def best_worker_endpoint(workers: EndpointName) -> EndpointName:
    """Return the endpoint at which the routers of these workers explain a choice."""
    return EndpointName(workers.namespace, workers.component, f"{workers.endpoint}_best_worker")


def is_answer_endpoint(name: EndpointName) -> bool:
    """Return whether a router answers questions at this endpoint, about its state or a choice."""
    return is_state_endpoint(name) or name.endpoint.endswith("_best_worker")


async def serve_answers(runtime: DistributedRuntime, router: Router) -> list[ServedEndpoint]:
    """Serve both endpoints, and return them. Raises StoreError, ConfigError, and ValueError if they are open
    already."""

    async def state(_: Any) -> Any:
        return router.state().to_json()

    async def best_worker(request: Any) -> Any:
        token_ids = token_ids_of(request)
        choice = await router.best_worker(token_ids, lora_name=request.get("lora_name"), request=request)
        return describe_choice(choice, router)

    served = []
    try:
        for name, handler in (
            (state_endpoint(router.endpoint), state),
            (best_worker_endpoint(router.endpoint), best_worker),
        ):
            served.append(await runtime.endpoint(str(name)).start_serving(handler))
    except BaseException:
        for endpoint in served:
            await endpoint.unregister()
        raise
    return served


def describe_choice(choice: WorkerChoice, router: Router) -> dict[str, Any]:
    """Return a choice that was made just now, as it is sent and printed: ids, blocks that match, whether the
    blocks of a listed worker are not known (`blind`), and the cost of each worker."""
    return {
        "instance_id": choice.worker.instance_id,
        "dp_rank": choice.worker.dp_rank,
        "overlap_blocks": choice.matched.device,
        "block_size": router.block_size,
        "blind": router.is_blind(),
        "cost": choice.cost,
        "costs": [
            {
                "instance_id": cost.worker.instance_id,
                "dp_rank": cost.worker.dp_rank,
                "matched": cost.matched._asdict(),
                "prefill_blocks": cost.prefill_blocks,
                "decode_blocks": cost.decode_blocks,
                "cost": cost.cost,
            }
            for cost in choice.costs
        ],
    }
