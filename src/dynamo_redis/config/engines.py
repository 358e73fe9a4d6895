"""Settings of models and engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr

from dynamo_redis.config.base import Duration, SettingsGroup, setting


def _check_directory(value: object) -> object:
    if isinstance(value, str) and not value.strip():  # a Path of it would be the working directory
        raise ValueError("must name a directory; leave it out for the demo model")
    return value


class ModelSettings(SettingsGroup):
    """Which model a worker serves."""

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
        "Most tokens of a prompt and its answer. Unset: what the engine says, else the model's files.",
        unit="tokens",
    )


class MockEngineSettings(SettingsGroup):
    """The mock engine: how large it is, and how fast. Its timing model: `engines/mock/batching.py`."""

    speedup_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] = setting(
        "DYN_MOCK_SPEEDUP_RATIO", 1.0, "How many times faster than real; 0 does not wait at all."
    )
    block_size: Annotated[int, Field(ge=1, le=4096)] = setting(
        "DYN_MOCK_BLOCK_SIZE", 16, "Tokens in a block of the KV cache.", unit="tokens"
    )
    total_kv_blocks: Annotated[int, Field(ge=1)] = setting(
        "DYN_MOCK_TOTAL_KV_BLOCKS", 16384, "Blocks the KV cache holds.", unit="blocks"
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
        "Most requests that wait for their turn; past that the engine answers Overloaded.",
        unit="requests",
    )
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = setting(
        "DYN_MOCK_MAX_NUM_BATCHED_TOKENS", 8192, "Most tokens computed in one step.", unit="tokens"
    )
    prefill_token_s: Duration = setting(
        "DYN_MOCK_PREFILL_TOKEN_S", 0.00005, "Time to read one token of a prompt.", unit="s"
    )
    decode_step_s: Duration = setting(
        "DYN_MOCK_DECODE_STEP_S", 0.008, "Time of one step, whatever its batch.", unit="s"
    )
    decode_sequence_s: Duration = setting(
        "DYN_MOCK_DECODE_SEQUENCE_S", 0.00003, "Further time of a step for each answer in it.", unit="s"
    )
    serve_cache: bool = setting(
        "DYN_MOCK_SERVE_CACHE",
        False,
        "Serve the endpoint kv_cache: what the KV cache really holds, for tests of routers.",
    )


class OpenAIEngineSettings(SettingsGroup):
    """An OpenAI-compatible engine behind a worker: where it is, and how it tells of its KV cache."""

    engine_url: SecretStr = setting(
        "DYN_ENGINE_URL", SecretStr("http://127.0.0.1:8001"), "Address of the engine's HTTP server."
    )
    engine_model: str | None = setting(
        "DYN_ENGINE_MODEL", None, "The model's name at the engine. Unset: the first that it lists."
    )
    engine_api_key: SecretStr | None = setting(
        "DYN_ENGINE_API_KEY", None, "Key that the engine demands, if it does."
    )
    engine_kind: Literal["auto", "vllm", "sglang", "llamacpp", "openai"] = setting(
        "DYN_ENGINE_KIND",
        "auto",
        "Whose server it is: vllm, sglang, llamacpp, openai (any other); auto: as it says of itself.",
    )
    engine_prompt: Literal["auto", "ids", "text"] = setting(
        "DYN_ENGINE_PROMPT",
        "auto",
        "How prompts are sent: ids (tokens), text, or auto: ids, and text if the engine refuses them.",
    )
    engine_health_path: Annotated[str, Field(pattern="^/")] | None = setting(
        "DYN_ENGINE_HEALTH_PATH",
        None,
        "Path that the engine answers with 200 while it is well. Unset: /health, or /v1/models where that is "
        "not found.",
    )
    kv_events_endpoint: str | None = setting(
        "DYN_KV_EVENTS_ENDPOINT",
        None,
        "Where it publishes its KV events, as tcp://host:port of rank 0. Unset: they are not followed.",
    )
    kv_replay_endpoint: str | None = setting(
        "DYN_KV_REPLAY_ENDPOINT", None, "Where the engine replays them, if it does; also of rank 0."
    )
    kv_events_topic: str = setting("DYN_KV_EVENTS_TOPIC", "", "The topic that it publishes under.")
    kv_events_clear: bool = setting(
        "DYN_KV_EVENTS_CLEAR",
        False,
        "Have the engine clear its prefix cache once events of it are lost for good, so that all of it is "
        "known again at once, and not as prompts bring it up.",
    )
    engine_data_parallel_size: Annotated[int, Field(ge=1, le=1024)] = setting(
        "DYN_ENGINE_DATA_PARALLEL_SIZE",
        1,
        "Data-parallel ranks of the engine; each publishes at the port after its predecessor's.",
        unit="ranks",
    )
    engine_block_size: Annotated[int, Field(ge=1, le=4096)] | None = setting(
        "DYN_ENGINE_BLOCK_SIZE",
        None,
        "Tokens in a block of its KV cache. Unset: what it says itself, else 16.",
        unit="tokens",
    )
    engine_total_kv_blocks: Annotated[int, Field(ge=1)] | None = setting(
        "DYN_ENGINE_TOTAL_KV_BLOCKS",
        None,
        "Blocks its KV cache holds, of one rank. Unset: what its metrics say, else 16384.",
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
        "DYN_ENGINE_START_TIMEOUT_S", 1800.0, "At start, longest wait for the engine to load.", unit="s"
    )
    engine_connect_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_ENGINE_CONNECT_TIMEOUT_S", 3.0, "Longest time to connect to the engine.", unit="s"
    )
    engine_poll_interval_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_ENGINE_POLL_INTERVAL_S", 1.0, "Time between looks at the engine's health and load.", unit="s"
    )
    engine_poll_timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        "DYN_ENGINE_POLL_TIMEOUT_S",
        3.0,
        "Longest time for its answer to that; after three in a row without one it counts as down.",
        unit="s",
    )
