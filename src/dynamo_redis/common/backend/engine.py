"""The engine of a unified backend: the names of `dynamo.common.backend.engine`.

A worker calls `from_args`, `start`, the hooks for metrics and KV events, then `generate` and `abort` for its
requests, and at the end `drain` and `cleanup`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Required, TypedDict

from dynamo_redis.common.backend.publisher import KvEventSource, SnapshotPublisher
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.endpoint import Endpoint

if TYPE_CHECKING:
    from dynamo_redis.common.backend.metrics import EngineMetrics
    from dynamo_redis.common.backend.worker import WorkerConfig


class GenerateRequest(TypedDict, total=False):
    """A request to `LLMEngine.generate`. Only `token_ids` is always there; docs/write-your-engine.md has
    all keys. `routing` has the `dp_rank` that a router chose."""

    token_ids: Required[list[int]]
    model: str
    sampling_options: dict[str, Any]
    stop_conditions: dict[str, Any]
    output_options: dict[str, Any]
    require_reasoning: bool
    prefill_result: dict[str, Any]
    bootstrap_info: dict[str, Any]
    multi_modal_data: dict[str, Any]
    mm_processor_kwargs: dict[str, Any]
    mm_routing_info: dict[str, Any]
    encoder_result: dict[str, Any]
    extra_args: dict[str, Any]
    routing: dict[str, Any]


class GenerateChunk(TypedDict, total=False):
    """An item of an answer: new tokens, and in the last one the `finish_reason`."""

    token_ids: Required[list[int]]
    index: Required[int]
    finish_reason: str
    completion_usage: dict[str, Any]
    disaggregated_params: dict[str, Any]
    encoder_result: dict[str, Any]
    log_probs: list[float]
    top_logprobs: list[list[dict[str, Any]]]
    engine_data: dict[str, Any]


@dataclass
class LlmRegistration:
    """Sizes of the engine for its model card; None: not known. `total_kv_blocks`, `max_num_seqs` and
    `max_num_batched_tokens` are of one data-parallel rank.

    Without `kv_cache_block_size` no KV events are published. The ranks begin at 0. The bootstrap address, of
    engines that hand KV caches on, has no effect.
    """

    context_length: int | None = None
    kv_cache_block_size: int | None = None
    total_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    data_parallel_size: int | None = None
    data_parallel_start_rank: int | None = None
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    enable_eagle: bool = False
    max_gpu_lora_count: int | None = None


@dataclass
class EngineConfig:
    """The description of itself that a started engine returns.

    `model` is the directory of the model's files, `served_model_name` the name in requests. The names of
    `WorkerConfig` come first.
    """

    model: str
    served_model_name: str | None = None
    runtime_data: dict[str, Any] | None = None
    llm: LlmRegistration | None = None
    model_aliases: list[str] = field(default_factory=list)


class BaseEngine(ABC):
    """An engine of any kind. A subclass has to define `from_args`, `start` and `cleanup`."""

    @classmethod
    @abstractmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[BaseEngine, WorkerConfig]:
        """Make the engine, not started yet, and its worker's configuration from the command line.

        `argv` None stands for `sys.argv[1:]`.
        """

    @abstractmethod
    async def start(self, worker_id: int) -> EngineConfig:
        """Return when requests can be served; raise to end the worker. `worker_id` is unique among workers.

        Cancelled if the worker is shut down meanwhile.
        """

    async def abort(self, context: Context) -> None:  # noqa: B027
        """Free what a request holds: its caller has left or stopped it. Default: nothing.

        Called while `generate` runs, which should end soon after; it is closed at its next `yield`, and
        cancelled after `DYN_CANCEL_GRACE_S`.
        """

    async def drain(self) -> None:  # noqa: B027
        """Finish work that goes on behind answered requests. Default: nothing.

        Called once at a shutdown, before `cleanup`, when no request is under way any more.
        """

    async def is_quiescent(self) -> bool | None:
        """Return whether no KV cache is being handed on. Not called: there are no prefill workers here."""
        return None

    @abstractmethod
    async def cleanup(self) -> None:
        """Free all resources. Called once, also after a `start` that raised."""

    async def register_prometheus(self, metrics: EngineMetrics) -> None:  # noqa: B027
        """Show metrics of the engine's own on the worker's `/metrics`, through `metrics`. Default: none."""

    def component_metrics_dp_ranks(self) -> list[int]:
        """Return the ranks that report their load to the `SnapshotPublisher`. Default: none."""
        return []

    def attach_snapshot_publisher(self, publisher: SnapshotPublisher) -> None:  # noqa: B027
        """Keep the publisher of load reports. Called once, if there are `component_metrics_dp_ranks`."""

    async def health_check_payload(self) -> dict[str, Any] | None:
        """Return the request by which an idle engine is checked, with `DYN_HEALTH_CHECK_ENABLED`. Default:
        None, no checks."""
        return None

    def supported_controls(self) -> set[str]:
        """Return the engine's controls. Named in the log: they have no route here."""
        return set()

    async def engine_control(self, control: str, body: dict[str, Any]) -> dict[str, Any]:
        """Do a control. Not called."""
        return {"status": "error", "message": f"unsupported engine control: {control}"}

    def supported_updates(self) -> set[str]:
        """Return the engine's updates. Named in the log: they have no route here."""
        return set()

    async def engine_update(self, update: str, body: dict[str, Any]) -> dict[str, Any]:
        """Do an update. Not called."""
        return {"status": "error", "message": f"unsupported engine update: {update}"}

    async def on_endpoint_ready(self, endpoint: Endpoint) -> None:  # noqa: B027
        """Keep the endpoint that is about to be served. Called once; an exception ends the worker."""


class LLMEngine(BaseEngine):
    """An engine that makes tokens of tokens. A subclass has to define `generate`, too."""

    @abstractmethod
    def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateChunk, None]:
        """Yield the answer of one request as tokens are made; the last item has a `finish_reason`.

        An async generator. It runs for many requests at once. Raise `InvalidArgument` of
        `dynamo_redis.llm.exceptions` to refuse a request.
        """

    async def kv_event_sources(self) -> list[KvEventSource]:
        """Return the source of KV events of each rank. Called once after `start`. Default: none."""
        return []

    async def logits_processor_spec(self) -> None:
        """Return None: no processors of logits. Not called by the worker."""
        return


RawRequest = dict[str, Any]
RawResponseChunk = dict[str, Any]


class RawEngine(BaseEngine):
    """An engine of images, videos or sound. It can be imported, and `Worker` refuses it: frontends here send
    tokens."""

    @abstractmethod
    def generate(self, request: RawRequest, context: Context) -> AsyncGenerator[RawResponseChunk, None]:
        """Yield the answer of one request."""


class DiffusionEngine(RawEngine):
    """A `RawEngine` of the diffusion family."""
