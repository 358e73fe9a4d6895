"""What `/health` says: whether a model can be served, and by whom."""

from __future__ import annotations

from typing import Any

from dynamo_redis.frontend.model import NamedModel
from dynamo_redis.router.kv_router import KvRouter
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.store.base import Registry


def health(models: list[NamedModel], registry: Registry) -> tuple[int, dict[str, Any]]:
    """Status and body: 200 once an instance of a loaded model can be reached, else 503.

    The instances are those that the registry lists (by the last view, while Redis is away) and that can
    serve; their secrets are left out. `hit_rate` is there in the router mode `kv`, once a request was
    answered.
    """
    endpoints: set[str] = set()
    instances: dict[tuple[str, int], dict[str, Any]] = {}
    served = []
    for model in models:
        reachable = model.instances()
        served.append({"name": model.name, "instances": len(reachable)})
        for instance in reachable:
            endpoints.add(f"dyn://{instance.name}")
            instances[str(instance.name), instance.instance_id] = _describe(instance)
    body: dict[str, Any] = {
        "status": "healthy" if instances else "unhealthy",
        "models": served,
        "endpoints": sorted(endpoints),
        "instances": [instances[key] for key in sorted(instances)],
        "registry": _registry_state(registry),
    }
    if registry.connected and registry.write_refusal is not None:
        body["registry_reason"] = registry.write_refusal
    hit_rate = _hit_rate(models)
    if hit_rate is not None:
        body["hit_rate"] = hit_rate
    if not instances:
        body["reason"] = "no model can be served yet: start a worker, or wait until it has registered"
    return (200 if instances else 503), body


def _registry_state(registry: Registry) -> str:
    if not registry.connected:
        return "unreachable"
    return "connected" if registry.write_refusal is None else "refuses writes"


def _hit_rate(models: list[NamedModel]) -> float | None:
    """Which part of the prompts' tokens workers had in their caches, if a router here counts it."""
    clients = {version.client for model in models for version in model.loaded()}
    routers = [client for client in clients if isinstance(client, KvRouter)]
    prompt_tokens = sum(router.counts.prompt_tokens for router in routers)
    cached_tokens = sum(router.counts.cached_tokens for router in routers)
    return cached_tokens / prompt_tokens if prompt_tokens else None


def _describe(instance: Instance) -> dict[str, Any]:
    return {
        "namespace": instance.namespace,
        "component": instance.component,
        "endpoint": instance.endpoint,
        "instance_id": instance.instance_id,
        "transport": instance.transports,
    }
