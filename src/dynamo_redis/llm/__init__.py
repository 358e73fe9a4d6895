"""For custom engines, under the names of `dynamo.llm`: register a model for frontends, and publish the
engine's KV events and load for routers. The page docs/write-your-engine.md shows how to use it, and
docs/dynamo-llm-names.md lists all names.
"""

from dynamo_redis.llm.block_hashes import compute_block_hash_for_seq
from dynamo_redis.llm.exceptions import RouterQueueLimitExceeded
from dynamo_redis.llm.model_names import ModelInput, ModelRuntimeConfig, ModelType, WorkerType
from dynamo_redis.llm.publishers import KvEventPublisher, WorkerMetricsPublisher
from dynamo_redis.llm.radix_tree import OverlapScores, RadixTree
from dynamo_redis.llm.registration import fetch_model, register_model, unregister_model
from dynamo_redis.llm.unary import LLMUnaryClient, UnaryChatModel, with_engine_data

fetch_llm = fetch_model
"""The older name of `fetch_model`."""

register_llm = register_model
"""The older name of `register_model`."""

unregister_llm = unregister_model
"""The older name of `unregister_model`."""

__all__ = [
    "KvEventPublisher",
    "LLMUnaryClient",
    "ModelInput",
    "ModelRuntimeConfig",
    "ModelType",
    "OverlapScores",
    "RadixTree",
    "RouterQueueLimitExceeded",
    "UnaryChatModel",
    "WorkerMetricsPublisher",
    "WorkerType",
    "compute_block_hash_for_seq",
    "fetch_llm",
    "fetch_model",
    "register_llm",
    "register_model",
    "unregister_llm",
    "unregister_model",
    "with_engine_data",
]
