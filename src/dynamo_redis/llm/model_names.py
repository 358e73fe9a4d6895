"""The description of a model that a worker registers, under the names of `dynamo.llm`. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum, Flag, auto
from typing import Any


class ModelInput(Enum):
    """The form of a request as the worker takes it. `register_model` takes `Tokens`."""

    Text = "text"
    Tokens = "tokens"
    Tensor = "tensor"


class ModelType(Flag):
    """Kinds of request that a model takes, joined by `|`. `register_model` takes `Chat` and `Completions`."""

    Empty = 0
    Chat = auto()
    Completions = auto()
    Embedding = auto()
    TensorBased = auto()
    Prefill = auto()
    Images = auto()
    Audios = auto()
    Videos = auto()
    Realtime = auto()
    Classify = auto()
    Pooling = auto()
    Rerank = auto()

    def supports_chat(self) -> bool:
        """Whether it answers conversations."""
        return ModelType.Chat in self

    def supports_embedding(self) -> bool:
        """Whether it makes embeddings."""
        return ModelType.Embedding in self

    def supports_classify(self) -> bool:
        """Whether it classifies sequences."""
        return ModelType.Classify in self

    def supports_pooling(self) -> bool:
        """Whether it hands out its pooler's output."""
        return ModelType.Pooling in self

    def supports_rerank(self) -> bool:
        """Whether it scores relevance."""
        return ModelType.Rerank in self


class WorkerType(Enum):
    """The stage of a request that a worker handles. `register_model` takes `Aggregated`: all of it."""

    Prefill = "prefill"
    Decode = "decode"
    Encode = "encode"
    Aggregated = "aggregated"

    def __str__(self) -> str:
        return self.value

    def __repr__(self) -> str:
        return f"WorkerType.{self.name}"


@dataclass
class ModelRuntimeConfig:
    """Sizes of a worker's engine, and its ways to serve. All may be set after it is made.

    The first five go into the model card. The others are Dynamo's: `register_model` names in the log those
    that were set, and they have no effect.
    """

    context_length: int | None = None
    """Most tokens of a prompt and its answer; None: what the model's files say."""
    total_kv_blocks: int | None = None
    """Of one data-parallel rank, as the next two."""
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    data_parallel_size: int = 1

    data_parallel_start_rank: int = 0
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    tokenizer_backend: str | None = None
    structural_tag: dict[str, Any] | None = None
    exclude_tools_when_tool_choice_none: bool = True
    enable_local_indexer: bool = True
    kv_event_publishing_enabled: bool | None = None
    kv_event_source_mode: str | None = None
    kv_state_endpoint: str | None = None
    enable_eagle: bool = False
    taints: set[str] = field(default_factory=set)
    stable_routing_id: str | None = None
    runtime_data: dict[str, Any] = field(default_factory=dict)
    topology_domains: dict[str, str] = field(default_factory=dict)
    kv_transfer_domain: str | None = None
    kv_transfer_enforcement: str | None = None
    kv_transfer_preferred_weight: float | None = None
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None

    def set_engine_specific(self, key: str, value: Any) -> None:
        """Set a value of `runtime_data`."""
        self.runtime_data[key] = value

    def get_engine_specific(self, key: str) -> Any | None:
        """The value of `runtime_data` under a key, or None."""
        return self.runtime_data.get(key)

    def set_structural_tag(self, structural_tag: dict[str, Any] | None) -> None:
        """Set `structural_tag`."""
        self.structural_tag = structural_tag

    def set_disaggregated_endpoint(
        self, bootstrap_host: str | None = None, bootstrap_port: int | None = None
    ) -> None:
        """Set `bootstrap_host` and `bootstrap_port`."""
        self.bootstrap_host, self.bootstrap_port = bootstrap_host, bootstrap_port

    def without_effect(self) -> list[str]:
        """The names of the fields that were set and mean nothing here."""
        usual = ModelRuntimeConfig()
        return [
            one.name
            for one in fields(self)
            if one.name not in _WITH_EFFECT and getattr(self, one.name) != getattr(usual, one.name)
        ]


_WITH_EFFECT = {
    "context_length",
    "total_kv_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
    "data_parallel_size",
    "data_parallel_start_rank",  # anything but 0 is refused
}
