"""For custom engines, under the names of `dynamo.llm`: register a model for frontends, and publish the
engine's KV events and load for routers. The page docs/write-your-engine.md shows how to use it.
"""

from dynamo_redis.llm.model_names import ModelInput, ModelRuntimeConfig, ModelType, WorkerType
from dynamo_redis.llm.publishers import KvEventPublisher, WorkerMetricsPublisher
from dynamo_redis.llm.registration import register_model, unregister_model

register_llm = register_model
"""The older name of `register_model`."""

unregister_llm = unregister_model
"""The older name of `unregister_model`."""

__all__ = [
    "KvEventPublisher",
    "ModelInput",
    "ModelRuntimeConfig",
    "ModelType",
    "WorkerMetricsPublisher",
    "WorkerType",
    "register_llm",
    "register_model",
    "unregister_llm",
    "unregister_model",
]
