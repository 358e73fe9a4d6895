"""For engines of one's own, under the names of `dynamo.llm`: how a model comes behind the frontend, and what
tells routers of the engine's KV cache and load. The page docs/write-your-engine.md shows how to use it.
"""

from dynamo_redis.llm.model_names import ModelInput, ModelRuntimeConfig, ModelType, WorkerType
from dynamo_redis.llm.publishers import KvEventPublisher, WorkerMetricsPublisher
from dynamo_redis.llm.registration import register_model, unregister_model

register_llm = register_model
"""The older name."""

unregister_llm = unregister_model
"""The older name."""

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
