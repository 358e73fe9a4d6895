"""The body of `/health`: the models that can be served, and their instances."""

from __future__ import annotations

from typing import Any

from dynamo_redis.frontend.model import NamedModel
from dynamo_redis.frontend.routing import router_of
from dynamo_redis.store.base import Registry


def health(models: list[NamedModel], registry: Registry) -> tuple[int, dict[str, Any]]:
    """Return status and body: 200 once an instance of a loaded model can be reached, else 503.

    The instances are those that the registry lists (in the last view, while Redis is away) and that can
    serve, without their secrets. `hit_rate`, the fraction of prompt tokens found in workers'
    caches, is present in the router mode `kv` after the first answer.
    """
    endpoints: set[str] = set()
    instances: dict[tuple[str, int], dict[str, Any]] = {}
    served = []
    for model in models:
        reachable = model.instances()
        served.append({"name": model.name, "instances": len(reachable)})
        for instance in reachable:
            endpoints.add(f"dyn://{instance.name}")
            instances[str(instance.name), instance.instance_id] = {
                "namespace": instance.namespace,
                "component": instance.component,
                "endpoint": instance.endpoint,
                "instance_id": instance.instance_id,
                "transport": instance.transports,
            }
    state = "connected" if registry.write_refusal is None else "refuses writes"
    body: dict[str, Any] = {
        "status": "healthy" if instances else "unhealthy",
        "models": served,
        "endpoints": sorted(endpoints),
        "instances": [instances[key] for key in sorted(instances)],
        "registry": state if registry.connected else "unreachable",
    }
    if registry.connected and registry.write_refusal is not None:
        body["registry_reason"] = registry.write_refusal
    clients = {version.client for model in models for version in model.loaded()}
    routers = [router for router in map(router_of, clients) if router is not None]
    prompt_tokens = sum(router.counts.prompt_tokens for router in routers)
    if prompt_tokens:
        body["hit_rate"] = sum(router.counts.cached_tokens for router in routers) / prompt_tokens
    if not instances:
        body["reason"] = "no model can be served yet: start a worker, or wait until it has registered"
    return (200 if instances else 503), body
