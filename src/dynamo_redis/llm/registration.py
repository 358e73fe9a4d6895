"""`register_model`: registers the model of a custom worker, so that frontends serve it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pydantic

from dynamo_redis.errors import ConfigError, ModelError
from dynamo_redis.llm.model_names import ModelInput, ModelRuntimeConfig, ModelType, WorkerType
from dynamo_redis.llm.publishers import place_of
from dynamo_redis.models.card import ModelCard, ModelKind, RuntimeConfig
from dynamo_redis.models.directory import ModelDirectory, read_model_directory
from dynamo_redis.models.upload import keep_model_files, make_card, publish_model
from dynamo_redis.names import EndpointName
from dynamo_redis.parsers.select import check_reasoning_parser, check_tool_parser
from dynamo_redis.runtime.awaitables import started
from dynamo_redis.runtime.endpoint import Endpoint
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.runtime.withdrawal import withdraw
from dynamo_redis.store.base import Registration
from dynamo_redis.supervision import supervised

log = logging.getLogger(__name__)

_DEFAULT_BLOCK_SIZE = 16


def register_model(
    model_input: ModelInput,
    model_type: ModelType,
    endpoint: Endpoint,
    model_path: str | Path,
    model_name: str | None = None,
    *,
    worker_type: WorkerType = WorkerType.Aggregated,
    kv_cache_block_size: int | None = None,
    router_config: object = None,
    runtime_config: ModelRuntimeConfig | None = None,
    tensor_model_config: object = None,
    user_data: object = None,
    custom_template_path: str | Path | None = None,
    media_decoder: object = None,
    media_fetcher: object = None,
    lora_name: str | None = None,
    base_model_path: str | None = None,
    needs: Sequence[Sequence[WorkerType]] | None = None,
    self_host_metadata: bool | None = None,
    ignore_weights: bool = False,
    max_gpu_lora_count: int | None = None,
    model_aliases: Sequence[str] | None = None,
    skip_model_assets: bool = False,
) -> asyncio.Task[None]:
    """Let frontends send requests for the model at `model_path` to this process's instance of `endpoint`.

    Frontends serve the model as soon as the endpoint is served, too. It stays registered until the runtime
    shuts down, or until `unregister_model`. Its small files are uploaded to Redis and kept there:
    tokenizer.json, tokenizer_config.json, chat templates, config.json and generation_config.json. Weights are
    neither read nor sent.

    Raises ConfigError for an argument that is not supported, which it names, and for a second model at the
    endpoint; ModelError if a file is missing or broken; StoreError if the upload fails.

    Args:
        model_input: `ModelInput.Tokens`; for embeddings also `ModelInput.Text`.
        model_type: Chat, Completions or both, or Embedding alone. Chat applies only to a model with a chat
            template.
        endpoint: the endpoint that serves the model.
        model_path: the model's directory.
        model_name: the name in requests; None: the name of the directory.
        worker_type: `WorkerType.Aggregated`.
        kv_cache_block_size: tokens a block, as of the worker's `KvEventPublisher`; None: 16.
        runtime_config: sizes of the engine. Its fields without effect here are named in the log.
        custom_template_path: a file of Jinja source that replaces the model's chat templates.
        self_host_metadata, ignore_weights: accepted, since both always apply here.

    All other arguments are Dynamo's and not supported.
    """
    unsupported = {
        "router_config": router_config,
        "tensor_model_config": tensor_model_config,
        "user_data": user_data,
        "media_decoder": media_decoder,
        "media_fetcher": media_fetcher,
        "lora_name": lora_name,
        "base_model_path": base_model_path,
        "needs": needs or None,
        "max_gpu_lora_count": max_gpu_lora_count,
        "model_aliases": model_aliases or None,
        "skip_model_assets": skip_model_assets or None,
    }
    embeds = model_type is ModelType.Embedding
    if model_input is not ModelInput.Tokens and not (embeds and model_input is ModelInput.Text):
        raise ConfigError(f"model_input={model_input}: frontends send tokens; use ModelInput.Tokens")
    if not embeds and (not model_type or model_type not in ModelType.Chat | ModelType.Completions):
        raise ConfigError(
            f"model_type={model_type}: use ModelType.Chat | ModelType.Completions, or one of them, or "
            "ModelType.Embedding"
        )
    if worker_type is not WorkerType.Aggregated:
        raise ConfigError(f"worker_type={worker_type}: a worker here handles all of a request (aggregated)")
    for name, value in unsupported.items():
        if value is not None:
            raise ConfigError(f"register_model: {name} is not supported here; leave it out")
    config = runtime_config or ModelRuntimeConfig()
    return started(
        _register(
            endpoint,
            Path(model_path).absolute(),
            model_name,
            config,
            template=None if custom_template_path is None else Path(custom_template_path),
            completes=ModelType.Completions in model_type,
            chats=model_type.supports_chat(),
            embeds=embeds,
            takes_text=model_input is ModelInput.Text,
            block_size=_DEFAULT_BLOCK_SIZE if kv_cache_block_size is None else kv_cache_block_size,
        )
    )


def fetch_model(remote_name: str, ignore_weights: bool = False) -> asyncio.Task[str]:
    """Return the absolute path of a model's directory on this machine. Raises ModelError for the name of a
    model on a hub: nothing is downloaded here. `ignore_weights` has no effect."""

    path = Path(remote_name).absolute()

    async def fetch() -> str:
        if not await asyncio.to_thread(path.is_dir):
            raise ModelError(f"{remote_name} is no directory on this machine, and nothing is downloaded")
        return str(path)

    return started(fetch())


def unregister_model(endpoint: Endpoint, lora_name: str | None = None) -> asyncio.Task[None]:
    """Unregister the model that `register_model` has registered for the endpoint. Requests under way finish.

    Has no effect if there is none. Raises ConfigError for a `lora_name`: adapters are not supported.
    """
    if lora_name is not None:
        raise ConfigError(f"lora_name={lora_name!r}: LoRA adapters are not registered here")
    runtime, name = place_of(endpoint)
    return started(_models_of(runtime).withdraw(name))


async def _register(
    endpoint: Endpoint,
    path: Path,
    model_name: str | None,
    config: ModelRuntimeConfig,
    *,
    template: Path | None,
    completes: bool,
    chats: bool,
    embeds: bool,
    takes_text: bool,
    block_size: int,
) -> None:
    """Read the model's files, make the card and publish both, as `register_model` describes."""
    runtime, name = place_of(endpoint)
    if without_effect := config.without_effect():
        log.warning("ModelRuntimeConfig: %s: not known here, no effect", ", ".join(without_effect))
    model = await asyncio.to_thread(read_model, path, template, config.context_length, renders=not embeds)
    model_type: ModelKind = "embedding"
    if not embeds:
        model_type = model_kind(model, path, chats=chats, completes=completes)
    if config.data_parallel_start_rank:
        raise ConfigError(
            f"data_parallel_start_rank={config.data_parallel_start_rank}: a worker's ranks begin at 0 here"
        )
    check_parsers(config.tool_call_parser, config.reasoning_parser)
    try:
        card = make_card(
            model,
            model_name=model_name or path.name,
            model_type=model_type,
            model_input="text" if takes_text else "tokens",
            kv_cache_block_size=block_size,
            runtime_config=RuntimeConfig(
                total_kv_blocks=config.total_kv_blocks,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                data_parallel_size=config.data_parallel_size,
                event_plane=runtime.settings.events.event_plane,
                tool_call_parser=config.tool_call_parser,
                reasoning_parser=config.reasoning_parser,
            ),
        )
    except pydantic.ValidationError as exc:
        found = exc.errors(include_url=False)[0]
        raise ConfigError(f"{'.'.join(map(str, found['loc']))}: {found['msg']}") from exc
    await runtime.start()
    await _models_of(runtime).publish(name, model, card)


def check_parsers(tool_call_parser: str | None, reasoning_parser: str | None) -> None:
    """Raise ConfigError for the name of a parser that is not here; None is any."""
    for option, parser, check in (
        ("tool_call_parser", tool_call_parser, check_tool_parser),
        ("reasoning_parser", reasoning_parser, check_reasoning_parser),
    ):
        if parser is not None:
            try:
                check(parser)
            except ValueError as exc:
                raise ConfigError(f"{option}={parser!r}: {exc}") from None


def model_kind(model: ModelDirectory, path: Path, *, chats: bool, completes: bool) -> ModelKind:
    """Return the kinds of request that a model serves of those wanted. Raises ModelError if it is none."""
    if not model.chat_templates and not completes:
        raise ModelError(
            f"{path} has no chat template, so it cannot be served for chat: give a template, or serve "
            "completions, too"
        )
    if not model.chat_templates or not chats:
        return "completions"
    return "chat+completions" if completes else "chat"


def read_model(
    path: Path, template: Path | None, context_length: int | None, *, renders: bool = True
) -> ModelDirectory:
    """Read the files, and if the model `renders` try the templates as a frontend will do. Blocks. Raises
    ModelError."""
    if not path.exists():
        raise ModelError(f"there is no {path}: name a directory on this machine, nothing is downloaded")
    model = read_model_directory(path, context_length=context_length, chat_template=template)
    if renders and model.chat_templates and find_spec("jinja2"):  # without jinja2 only the frontend can tell
        from dynamo_redis.models.chat_template import ChatTemplate

        ChatTemplate(model.chat_templates, model.tokenizer_config).check()
    return model


def _models_of(runtime: DistributedRuntime) -> _RegisteredModels:
    return runtime.attach("models", lambda: _RegisteredModels(runtime))


class _RegisteredModels:
    """The models that a runtime has registered, one for each endpoint.

    Each has a task that keeps its files in Redis until the model is withdrawn, and withdraws its card when
    the runtime shuts down.
    """

    def __init__(self, runtime: DistributedRuntime) -> None:
        self._runtime = runtime
        self._models: dict[EndpointName, tuple[Registration, asyncio.Task[None]] | None] = {}

    async def publish(self, name: EndpointName, model: ModelDirectory, card: ModelCard) -> None:
        """Upload the files and register the card. Raises ConfigError, ModelError, StoreError."""
        if name in self._models:
            raise ConfigError(f"{name} has a model already: call unregister_model first")
        self._models[name] = None
        try:
            registration = await publish_model(self._runtime, name, model, card)
        except BaseException:
            del self._models[name]
            raise
        if name not in self._models:  # withdrawn meanwhile
            await withdraw([registration])
            return
        task = f"files of model {card.display_name}"

        async def keep_files() -> None:
            runtime = self._runtime
            await keep_model_files(runtime.objects, model, card, lambda: runtime.registry.process_count)

        async def keep_until_shutdown() -> None:
            async with supervised(log, task, keep_files):
                await self._runtime.wait_for_shutdown()
                await withdraw([registration])  # frontends stop sending before the endpoint is gone

        self._models[name] = registration, asyncio.create_task(keep_until_shutdown(), name=task)
        log.info("model %s is registered at %s", card.display_name, name)

    async def withdraw(self, name: EndpointName) -> None:
        """Withdraw the endpoint's card and end its task. Has no effect without one."""
        entry = self._models.pop(name, None)
        if entry is not None:
            registration, keeping = entry
            keeping.cancel()
            await asyncio.wait([keeping])
            await withdraw([registration])

    async def aclose(self) -> None:
        """Withdraw all cards."""
        await asyncio.gather(*map(self.withdraw, tuple(self._models)))
