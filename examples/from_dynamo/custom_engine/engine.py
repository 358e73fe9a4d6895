"""A worker by the unified backend: its engine answers with the prompt backwards, token by token.

DYN_REDIS_URL=redis://localhost:6379 python examples/from_dynamo/custom_engine/engine.py --model ./my-model

The engine reports the blocks of prompts as cached, so that a router sends a prompt to the worker that has
seen it. `./my-model` has the model's tokenizer and configuration; no weights are needed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Any

from dynamo_redis._core import Context
from dynamo_redis.common.backend import (
    EngineConfig,
    GenerateChunk,
    GenerateRequest,
    LLMEngine,
    LlmRegistration,
    WorkerConfig,
)
from dynamo_redis.common.backend.publisher import ComponentSnapshot, KvEventSource, PushSource
from dynamo_redis.common.backend.run import run
from dynamo_redis.llm import KvEventPublisher
from dynamo_redis.llm.exceptions import InvalidArgument

BLOCK_SIZE = 4
TOTAL_BLOCKS = 1000


class BackwardsEngine(LLMEngine):
    def __init__(self, model: str, delay_s: float) -> None:
        self.model = model
        self.delay_s = delay_s
        self.cached: dict[int, None] = {}  # the engine's hashes of its blocks
        self.events: KvEventPublisher | None = None
        self.load: Any = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[BackwardsEngine, WorkerConfig]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--model", required=True)
        parser.add_argument("--served-model-name", default="backwards")
        parser.add_argument("--namespace", default="dynamo")
        parser.add_argument("--delay", type=float, default=0.0)
        args = parser.parse_args(argv)
        config = WorkerConfig(
            namespace=args.namespace,
            component="backwards",
            model_name=args.model,
            served_model_name=args.served_model_name,
            discovery_backend=os.environ.get("DYN_DISCOVERY_BACKEND", "etcd"),
            request_plane=os.environ.get("DYN_REQUEST_PLANE", "tcp"),
            event_plane=os.environ.get("DYN_EVENT_PLANE"),
        )
        return cls(args.model, args.delay), config

    async def start(self, worker_id: int) -> EngineConfig:
        print(f"started as worker {worker_id:x}", flush=True)
        sizes = LlmRegistration(kv_cache_block_size=BLOCK_SIZE, total_kv_blocks=TOTAL_BLOCKS, max_num_seqs=8)
        return EngineConfig(model=self.model, llm=sizes)

    async def kv_event_sources(self) -> list[KvEventSource]:
        return [PushSource(on_ready=self.keep_publisher)]

    def keep_publisher(self, publisher: KvEventPublisher) -> None:
        self.events = publisher

    def component_metrics_dp_ranks(self) -> list[int]:
        return [0]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        self.load = publisher

    async def generate(
        self, request: GenerateRequest, context: Context
    ) -> AsyncGenerator[GenerateChunk, None]:
        prompt = request["token_ids"]
        if request.get("sampling_options", {}).get("guided_decoding"):
            raise InvalidArgument("guided decoding is not supported by this engine")
        self.note_cached(prompt)
        budget = request.get("stop_conditions", {}).get("max_tokens") or len(prompt)
        for token in prompt[::-1][:budget]:
            if context.is_stopped():
                return
            yield {"token_ids": [token], "index": 0}
            await asyncio.sleep(self.delay_s)
        yield {
            "token_ids": [],
            "index": 0,
            "finish_reason": "stop" if budget >= len(prompt) else "length",
            "completion_usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": min(budget, len(prompt)),
                "total_tokens": len(prompt) + min(budget, len(prompt)),
            },
        }

    def note_cached(self, prompt: list[int]) -> None:
        parent = None
        for end in range(BLOCK_SIZE, len(prompt) + 1, BLOCK_SIZE):
            block = hash(tuple(prompt[:end]))
            if block not in self.cached and self.events is not None:
                self.events.publish_stored(prompt[end - BLOCK_SIZE : end], [BLOCK_SIZE], [block], parent)
            self.cached[block] = None
            parent = block
        if self.load is not None:
            used = len(self.cached)
            self.load.publish(0, ComponentSnapshot(used, TOTAL_BLOCKS, used / TOTAL_BLOCKS, dp_rank=0))

    async def abort(self, context: Context) -> None:
        print(f"aborted {context.id()}", flush=True)

    async def cleanup(self) -> None:
        self.events = self.load = None
        print("cleaned up", flush=True)


if __name__ == "__main__":
    run(BackwardsEngine)
