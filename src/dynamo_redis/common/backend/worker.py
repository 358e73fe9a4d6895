"""A worker of the unified backend: the names of `dynamo.common.backend.worker`."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

from dynamo_redis.common.backend.adapter import AdaptedEngine
from dynamo_redis.common.backend.engine import BaseEngine, EngineConfig, LLMEngine
from dynamo_redis.common.backend.health_check import parse_health_check_payload_cli
from dynamo_redis.common.constants import DisaggregationMode
from dynamo_redis.engines.worker import serve_engine
from dynamo_redis.errors import ConfigError
from dynamo_redis.llm.model_names import ModelInput
from dynamo_redis.llm.registration import check_parsers, model_kind, read_model
from dynamo_redis.names import EndpointName, format_instance_id
from dynamo_redis.parsers.detection import AUTO
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.runtime.worker import run_worker

log = logging.getLogger(__name__)

_NOT_SERVED: Final = ("route_to_encoder", "media_decoder", "media_fetcher", "kv_state_endpoint")
_WITHOUT_EFFECT: Final = (
    "use_kv_events",
    "exclude_tools_when_tool_choice_none",
    "enable_local_indexer",
    "structural_tag",
    "default_thinking_mode",
)


@dataclass
class WorkerConfig:
    """Where a worker serves, and which model. The fields are those of Dynamo, in its order.

    `model_name` is the directory of the model's files; "": the engine's. `served_model_name` is the name in
    requests; None: the engine's, or that of the directory. `endpoint_types` has "chat", "completions" or
    both. `tool_call_parser` and `reasoning_parser` None stand for those of the model's chat template.
    `enable_kv_routing=False` publishes neither KV events nor load. `Worker` refuses values that cannot
    be served here, and names those without effect in the log.
    """

    namespace: str
    component: str = "backend"
    endpoint: str = "generate"
    model_name: str = ""
    served_model_name: str | None = None
    model_input: ModelInput = ModelInput.Tokens
    endpoint_types: str = "chat,completions"
    discovery_backend: str = "etcd"
    request_plane: str = "tcp"
    event_plane: str | None = None
    use_kv_events: bool = False
    custom_jinja_template: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    exclude_tools_when_tool_choice_none: bool = True
    enable_local_indexer: bool = True
    enable_kv_routing: bool = True
    metrics_labels: list[tuple[str, str]] = field(default_factory=list)
    disaggregation_mode: DisaggregationMode = DisaggregationMode.AGGREGATED
    health_check_payload: dict[str, Any] | None = None
    structural_tag: dict[str, object] | None = None
    route_to_encoder: bool = False
    media_decoder: object = None
    media_fetcher: object = None
    kv_state_endpoint: str | None = None
    default_thinking_mode: str | None = None
    response_plane: str = "tcp"

    @classmethod
    def from_runtime_config(
        cls,
        runtime_cfg: Any,
        model_name: str,
        served_model_name: str | None = None,
        model_input: ModelInput | None = None,
        **overrides: Any,
    ) -> Self:
        """Return the configuration of an object with fields of these names, as parsed arguments; `overrides`
        replace them. Parsers have `dyn_` before their names there. Raises TypeError for an unknown field."""
        prefixed = ("tool_call_parser", "reasoning_parser", "default_thinking_mode")
        given: dict[str, Any] = {}
        for option in fields(cls):
            theirs = f"dyn_{option.name}" if option.name in prefixed else option.name
            if (value := getattr(runtime_cfg, theirs, None)) is not None:
                given[option.name] = value
        given |= {"model_name": model_name, "served_model_name": served_model_name}
        if isinstance(payload := given.get("health_check_payload"), str):
            given["health_check_payload"] = parse_health_check_payload_cli(payload)
        if isinstance(mode := given.get("disaggregation_mode"), str):
            given["disaggregation_mode"] = DisaggregationMode(mode)
        if model_input is not None:
            given["model_input"] = model_input
        return cls(**(given | overrides))

    def served_kinds(self) -> set[str]:
        """Return the kinds of `endpoint_types`. Raises ConfigError if one cannot be served here."""
        kinds = {kind.strip() for kind in self.endpoint_types.split(",")}
        if not kinds or not kinds <= {"chat", "completions"}:
            raise ConfigError(f"endpoint_types={self.endpoint_types!r}: use chat,completions, or one of them")
        return kinds

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be served here, and log those without effect."""
        self.served_kinds()
        check_parsers(self.tool_call_parser, self.reasoning_parser)
        if self.model_input is not ModelInput.Tokens:
            raise ConfigError(f"model_input={self.model_input}: frontends send tokens; use ModelInput.Tokens")
        if getattr(self.disaggregation_mode, "name", None) != "AGGREGATED":
            raise ConfigError(
                f"disaggregation_mode={self.disaggregation_mode}: a worker here handles all of a request"
            )
        for name in _NOT_SERVED:
            if getattr(self, name):
                raise ConfigError(f"WorkerConfig: {name} is not supported here; leave it out")
        unused = [
            name for name in _WITHOUT_EFFECT if getattr(self, name) != getattr(WorkerConfig, name, None)
        ]
        if unused:
            log.warning("WorkerConfig: %s: no effect here", ", ".join(unused))


class Worker:
    """Serves one engine."""

    def __init__(self, engine: BaseEngine, config: WorkerConfig) -> None:
        self.engine = engine
        self.config = config

    async def run(self) -> None:
        """Start the engine, register its model and serve it until SIGTERM or SIGINT; then let requests under
        way finish, and clean the engine up.

        A second signal ends the process at once. Raises ConfigError for a configuration that cannot be
        served, ModelError for files that no frontend could use, StoreError, and EngineFailed if the engine's
        `start` or `cleanup` fails.
        """
        config = self.config
        if not isinstance(self.engine, LLMEngine):
            raise ConfigError(f"{type(self.engine).__name__} is no LLMEngine: frontends here send tokens")

        def make_runtime() -> DistributedRuntime:
            config.check()
            return DistributedRuntime(
                None,
                config.discovery_backend,
                config.request_plane,
                event_plane=config.event_plane,
                response_plane=config.response_plane,
            )

        await run_worker(make_runtime, self.serve)

    async def serve(self, runtime: DistributedRuntime) -> None:
        """Serve the engine as `run` does, until `runtime` shuts down. The caller starts and closes it."""
        config = self.config
        assert isinstance(self.engine, LLMEngine)
        name = EndpointName(config.namespace, config.component, config.endpoint)
        engine = AdaptedEngine(
            self.engine,
            runtime.endpoint(str(name)),
            publishes=config.enable_kv_routing,
            labels={
                "dynamo_namespace": name.namespace,
                "dynamo_component": name.component,
                "dynamo_endpoint": name.endpoint,
                "worker_id": format_instance_id(runtime.instance_id),
                **dict(config.metrics_labels),
            },
            abort_s=runtime.settings.plane.cancel_grace_s,
            closing_s=runtime.settings.runtime.closing_s,
        )
        remove = runtime.add_metrics(engine.metrics)
        try:
            said = await _unless_shut_down(runtime, engine.begin(runtime.instance_id))
            if said is not None:
                await self._serve_begun(runtime, engine, str(name), said)
        finally:
            try:
                await engine.aclose()
            finally:
                remove()

    async def _serve_begun(
        self, runtime: DistributedRuntime, engine: AdaptedEngine, endpoint: str, said: EngineConfig
    ) -> None:
        """Serve a started engine until the runtime shuts down. Raises as `run` does."""
        config = self.config
        if said.model_aliases:
            raise ConfigError(f"model_aliases={said.model_aliases}: a model has one name here")
        if said.runtime_data:
            log.warning("EngineConfig: runtime_data: no effect here")
        for what, found in (
            ("controls", self.engine.supported_controls()),
            ("updates", self.engine.supported_updates()),
        ):
            if found:
                log.warning("the engine's %s have no route here: %s", what, ", ".join(sorted(found)))
        path = Path(config.model_name or said.model).absolute()  # noqa: ASYNC240 - asks no disk
        template = config.custom_jinja_template
        model = await asyncio.to_thread(
            read_model, path, None if template is None else Path(template), engine.capacity.context_length
        )
        kinds = config.served_kinds()
        await serve_engine(
            runtime,
            engine,
            model,
            endpoint=endpoint,
            model_name=config.served_model_name or said.served_model_name or path.name,
            model_type=model_kind(model, path, chats="chat" in kinds, completes="completions" in kinds),
            metrics_labels=config.metrics_labels or None,
            tool_call_parser=config.tool_call_parser or AUTO,
            reasoning_parser=config.reasoning_parser or AUTO,
            health_check_payload=config.health_check_payload or await engine.health_check_payload(),
        )


async def _unless_shut_down(runtime: DistributedRuntime, work: Any) -> EngineConfig | None:
    """Return the result of the work; None, and the work is cancelled, if the shutdown comes first."""
    working: asyncio.Task[EngineConfig] = asyncio.ensure_future(work)
    stopping = asyncio.create_task(runtime.wait_for_shutdown())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        log.info("the shutdown came while the engine started")
        return None
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.wait((working, stopping), timeout=runtime.settings.runtime.closing_s)
