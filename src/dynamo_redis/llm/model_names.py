"""The description of a model that a worker registers, under the names of `dynamo.llm`. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum, Flag, auto
from typing import Any


class ModelInput(Enum):
    """The form of a request at the worker. `register_model` accepts `Tokens`, and `Text`
    for embeddings."""

    Text = "text"
    Tokens = "tokens"
    Tensor = "tensor"


class ModelType(Flag):
    """Kinds of request that a model serves, joined by `|`.

    `register_model` accepts `Chat` and `Completions`, or `Embedding` alone.
    """

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
        """Return whether the model answers conversations."""
        return ModelType.Chat in self

    def supports_embedding(self) -> bool:
        """Return whether the model makes embeddings."""
        return ModelType.Embedding in self

    def supports_classify(self) -> bool:
        """Return whether the model classifies sequences."""
        return ModelType.Classify in self

    def supports_pooling(self) -> bool:
        """Return whether the model returns its pooler's output."""
        return ModelType.Pooling in self

    def supports_rerank(self) -> bool:
        """Return whether the model scores relevance."""
        return ModelType.Rerank in self


class WorkerType(Enum):
    """The stage of a request that a worker handles. `register_model` accepts `Aggregated`: all stages."""

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
    """Sizes and options of a worker's engine. All may be set after it is made.

    The first seven go into the model card. The others are Dynamo's and have no effect: `register_model` logs
    the names of those that are set.
    """

    context_length: int | None = None
    """The most tokens of a prompt and its answer together; None: as in the model's files."""
    total_kv_blocks: int | None = None
    """Of one data-parallel rank, as are the next two."""
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    data_parallel_size: int = 1
    tool_call_parser: str | None = None
    """The format of the tool calls in answers; None: by the model's chat template."""
    reasoning_parser: str | None = None
    """The format of the reasoning in answers, likewise."""

    data_parallel_start_rank: int = 0
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
        """Return the value of `runtime_data` under a key, or None."""
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
        """Return the names of the fields that were set and have no effect here."""
        defaults = ModelRuntimeConfig()
        return [
            option.name
            for option in fields(self)
            if option.name not in _WITH_EFFECT
            and getattr(self, option.name) != getattr(defaults, option.name)
        ]


_WITH_EFFECT = {
    "context_length",
    "total_kv_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
    "data_parallel_size",
    "tool_call_parser",
    "reasoning_parser",
    "data_parallel_start_rank",  # any value but 0 is refused
}
