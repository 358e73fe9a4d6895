"""Settings of models and engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from dynamo_redis.config.base import Duration, SettingsGroup, setting
from dynamo_redis.parsers.detection import AUTO


def _check_directory(value: object) -> object:
    if isinstance(value, str) and not value.strip():  # a Path of it would be the working directory
        raise ValueError("must name a directory; unset it for the demo model")
    return value


def _check_tool_parser(name: str) -> str:
    from dynamo_redis.parsers.select import check_tool_parser  # few commands need the table

    return check_tool_parser(name)


def _check_reasoning_parser(name: str) -> str:
    from dynamo_redis.parsers.select import check_reasoning_parser

    return check_reasoning_parser(name)


def _check_modalities(value: str) -> str:
    names = [name.strip().lower() for name in value.split(",")]
    if unknown := [name for name in names if name not in ("image", "audio", "video")]:
        raise ValueError(f"{unknown[0]!r} is none of image, audio, video")
    return ",".join(sorted(set(names)))


class ModelSettings(SettingsGroup):
    """The model of a worker."""

    model_path: Annotated[Path, BeforeValidator(_check_directory)] | None = setting(
        "DYN_MODEL_PATH",
        None,
        "Directory with the model's tokenizer.json, tokenizer_config.json, config.json and "
        "generation_config.json. Unset: a small demo model.",
    )
    model_name: Annotated[str, Field(min_length=1, max_length=256)] | None = setting(
        "DYN_MODEL_NAME", None, "The model's name in requests. Unset: the directory's name."
    )
    context_length: Annotated[int, Field(ge=1)] | None = setting(
        "DYN_CONTEXT_LENGTH",
        None,
        "Most tokens of a prompt and its answer. Unset: the engine's value, else that of the model's files.",
        unit="tokens",
    )
    model_type: Literal["auto", "embedding"] = setting(
        "DYN_MODEL_TYPE",
        "auto",
        "What the model is for: embedding (`/v1/embeddings` alone), or auto (text completions, and chats if "
        "it has a chat template).",
    )
    matryoshka: Literal["auto", "true", "false"] = setting(
        "DYN_MATRYOSHKA",
        "auto",
        "Whether the model's embeddings can be shortened (`dimensions`). auto: as is_matryoshka and "
        "matryoshka_dimensions in config.json say; without them the engine decides.",
    )
    model_migration_limit: Annotated[int, Field(ge=0)] = setting(
        "DYN_MODEL_MIGRATION_LIMIT",
        0,
        "How often an answer of this model goes on at another worker after its worker was lost, unless the "
        "frontend has a limit of its own (`--migration-limit`).",
    )
    tool_call_parser: Annotated[str, AfterValidator(_check_tool_parser)] = setting(
        "DYN_TOOL_CALL_PARSER",
        AUTO,
        "The format of the tool calls in the model's answers: auto (by its chat template), none, hermes, "
        "llama3_json, mistral, deepseek_v3, pythonic, qwen3_coder, ….",
    )
    reasoning_parser: Annotated[str, AfterValidator(_check_reasoning_parser)] = setting(
        "DYN_REASONING_PARSER",
        AUTO,
        "The format of the reasoning in the model's answers: auto (by its chat template), none, basic, "
        "deepseek_r1, qwen3, granite, mistral, ….",
    )


class MockEngineSettings(SettingsGroup):
    """The mock engine: its sizes and its speed. The timing model is in `engines/mock/batching.py`."""

    speedup_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] = setting(
        "DYN_MOCK_SPEEDUP_RATIO", 1.0, "Speed relative to real time; 0: no waiting."
    )
    block_size: Annotated[int, Field(ge=1, le=4096)] = setting(
        "DYN_MOCK_BLOCK_SIZE", 16, "Tokens in a block of the KV cache.", unit="tokens"
    )
    total_kv_blocks: Annotated[int, Field(ge=1)] = setting(
        "DYN_MOCK_TOTAL_KV_BLOCKS", 16384, "Blocks that the KV cache holds.", unit="blocks"
    )
    data_parallel_size: Annotated[int, Field(ge=1, le=64)] = setting(
        "DYN_MOCK_DATA_PARALLEL_SIZE",
        1,
        "Data-parallel ranks, each with a KV cache and a batch of its own.",
        unit="ranks",
    )
    max_num_seqs: Annotated[int, Field(ge=1)] = setting(
        "DYN_MOCK_MAX_NUM_SEQS", 256, "Most requests that run at once.", unit="requests"
    )
    max_num_waiting: Annotated[int, Field(ge=0)] = setting(
        "DYN_MOCK_MAX_NUM_WAITING",
        1024,
        "Most requests that wait to run; beyond that the engine answers Overloaded.",
        unit="requests",
    )
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = setting(
        "DYN_MOCK_MAX_NUM_BATCHED_TOKENS", 8192, "Most tokens computed in one step.", unit="tokens"
    )
    prefill_token_s: Duration = setting(
        "DYN_MOCK_PREFILL_TOKEN_S", 0.00005, "Time to read one token of a prompt.", unit="s"
    )
    decode_step_s: Duration = setting(
        "DYN_MOCK_DECODE_STEP_S", 0.008, "Time of one step, for any batch.", unit="s"
    )
    decode_sequence_s: Duration = setting(
        "DYN_MOCK_DECODE_SEQUENCE_S", 0.00003, "Additional time of a step for each answer in it.", unit="s"
    )
    embedding_dimensions: Annotated[int, Field(ge=1, le=65536)] = setting(
        "DYN_MOCK_EMBEDDING_DIMENSIONS",
        384,
        "Length of the vectors with --model-type embedding.",
        unit="numbers",
    )
    serve_cache: bool = setting(
        "DYN_MOCK_SERVE_CACHE",
        False,
        "Serve the endpoint kv_cache, which lists the real contents of the KV cache, for tests of routers.",
    )


class OpenAIEngineSettings(SettingsGroup):
    """An OpenAI-compatible engine behind a worker: its address, its KV events, its sizes, its health."""

    engine_url: SecretStr = setting(
        "DYN_ENGINE_URL", SecretStr("http://127.0.0.1:8001"), "Address of the engine's HTTP server."
    )
    engine_model: str | None = setting(
        "DYN_ENGINE_MODEL", None, "The model's name at the engine. Unset: the first that the engine lists."
    )
    engine_api_key: SecretStr | None = setting(
        "DYN_ENGINE_API_KEY", None, "API key, if the engine requires one."
    )
    engine_kind: Literal["auto", "vllm", "sglang", "llamacpp", "openai"] = setting(
        "DYN_ENGINE_KIND",
        "auto",
        "Kind of engine: vllm, sglang, llamacpp, openai (any other); auto: as its server identifies itself.",
    )
    engine_prompt: Literal["auto", "ids", "text"] = setting(
        "DYN_ENGINE_PROMPT",
        "auto",
        "Form of the prompts: ids (token ids), text, or auto (ids, and text if the engine refuses ids).",
    )
    engine_modalities: Annotated[str, AfterValidator(_check_modalities)] | None = setting(
        "DYN_ENGINE_MODALITIES",
        None,
        "Parts beside text that the engine reads in its chat completions, with commas between them: image, "
        "audio, video. Unset: frontends refuse them.",
    )
    engine_health_path: Annotated[str, Field(pattern="^/")] | None = setting(
        "DYN_ENGINE_HEALTH_PATH",
        None,
        "Path that the engine answers with 200 while it is healthy. Unset: /health, or /v1/models if /health "
        "is not found.",
    )
    kv_events_endpoint: str | None = setting(
        "DYN_KV_EVENTS_ENDPOINT",
        None,
        "Address of the engine's KV events, tcp://host:port of rank 0. Unset: the engine is asked.",
    )
    kv_events_discovery: Literal["engine", "any", "off"] = setting(
        "DYN_KV_EVENTS_DISCOVERY",
        "engine",
        "Which addresses of KV events an engine (vLLM, SGLang) may report when it is asked: engine (at the "
        "host of --engine-url only), any, or off (it is not asked).",
    )
    kv_replay_endpoint: str | None = setting(
        "DYN_KV_REPLAY_ENDPOINT",
        None,
        "Address of the engine's replay of KV events, if it has one; of rank 0.",
    )
    kv_events_topic: str = setting("DYN_KV_EVENTS_TOPIC", "", "ZeroMQ topic of the engine's KV events.")
    kv_events_clear: bool = setting(
        "DYN_KV_EVENTS_CLEAR",
        False,
        "When KV events are lost for good, have the engine clear its prefix cache: its contents are then "
        "known again at once. false: they become known as prompts use them.",
    )
    engine_data_parallel_size: Annotated[int, Field(ge=1, le=1024)] | None = setting(
        "DYN_ENGINE_DATA_PARALLEL_SIZE",
        None,
        "Data-parallel ranks of the engine. Each publishes at the port after that of the rank before. Unset: "
        "the number of ranks for which the engine reports KV events, else 1.",
        unit="ranks",
    )
    engine_block_size: Annotated[int, Field(ge=1, le=4096)] | None = setting(
        "DYN_ENGINE_BLOCK_SIZE",
        None,
        "Tokens in a block of the engine's KV cache. Unset: what the engine reports, else 16.",
        unit="tokens",
    )
    engine_total_kv_blocks: Annotated[int, Field(ge=1)] | None = setting(
        "DYN_ENGINE_TOTAL_KV_BLOCKS",
        None,
        "Blocks in the KV cache of one rank. Unset: what the engine's metrics report, else 16384.",
        unit="blocks",
    )
    engine_max_num_seqs: Annotated[int, Field(ge=1)] = setting(
        "DYN_ENGINE_MAX_NUM_SEQS", 256, "Most requests that a rank runs at once.", unit="requests"
    )
    engine_max_num_batched_tokens: Annotated[int, Field(ge=1)] = setting(
        "DYN_ENGINE_MAX_NUM_BATCHED_TOKENS",
        8192,
        "Most tokens that a rank computes in one step.",
        unit="tokens",
    )
    engine_start_timeout_s: Duration = setting(
        "DYN_ENGINE_START_TIMEOUT_S", 1800.0, "Longest wait at start for the engine to load.", unit="s"
    )
    engine_connect_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_ENGINE_CONNECT_TIMEOUT_S", 3.0, "Longest time to connect to the engine.", unit="s"
    )
    engine_poll_interval_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_ENGINE_POLL_INTERVAL_S", 1.0, "Time between checks of the engine's health and load.", unit="s"
    )
    engine_poll_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_ENGINE_POLL_TIMEOUT_S",
        3.0,
        "Longest time for the answer to a check. After three checks in a row without an answer the engine "
        "counts as down.",
        unit="s",
    )


class UnifiedBackendSettings(SettingsGroup):
    """Engines of the unified backend."""

    health_check_payload: str | None = setting(
        "DYN_HEALTH_CHECK_PAYLOAD",
        None,
        "The request that an engine gets as a health check in place of its own: a JSON object, or `@` and "
        "the path of a file. The command line is the engine's.",
    )
