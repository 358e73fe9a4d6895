"""The unified backend: an engine is a class, and `run` makes a worker of it, under the names of
`dynamo.common.backend`. The page docs/moving-from-dynamo.md shows how to use it.
"""

from dynamo_redis.common.backend import telemetry
from dynamo_redis.common.backend.engine import (
    BaseEngine,
    DiffusionEngine,
    EngineConfig,
    GenerateChunk,
    GenerateRequest,
    LLMEngine,
    LlmRegistration,
    RawEngine,
    RawRequest,
    RawResponseChunk,
)
from dynamo_redis.common.backend.run import run
from dynamo_redis.common.backend.worker import Worker, WorkerConfig

__all__ = [
    "BaseEngine",
    "DiffusionEngine",
    "EngineConfig",
    "GenerateChunk",
    "GenerateRequest",
    "LLMEngine",
    "LlmRegistration",
    "RawEngine",
    "RawRequest",
    "RawResponseChunk",
    "Worker",
    "WorkerConfig",
    "run",
    "telemetry",
]
