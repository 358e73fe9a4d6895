"""Parameters that are no fields of a body: those that change no answer, and those that are refused.

The served parameters are the fields of the bodies' classes in `frontend/openai.py`. Together these are all
parameters of OpenAI's two completions, of vLLM's and SGLang's, and of Dynamo's `nvext`; docs/parameters.md
lists them. Any other name is refused as unknown, so that a misspelt one is noticed. Null counts as absent.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dynamo_redis.frontend.http.errors import ApiError, invalid

_LONGEST_NAME: Final = 64
_LEAST_LIKENESS: Final = 0.75


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason for refusing a parameter. `neutral` are its values that change nothing."""

    reason: str = "it is not supported by this server"
    neutral: tuple[Any, ...] = ()

    def permits(self, value: object) -> bool:
        """Return whether a value changes nothing. 0 and false differ."""
        return any(value == neutral and type(value) is type(neutral) for neutral in self.neutral)


@dataclass(frozen=True, slots=True)
class Parameters:
    """The known parameters of one object besides its fields."""

    refused: Mapping[str, Refusal]
    harmless: Mapping[str, str] = field(default_factory=dict)

    def check(self, further: Mapping[str, Any] | None, fields: Iterable[str], at: str = "") -> None:
        """Raise ApiError for the first of `further` that is refused or unknown.

        `fields` are those of the object; `at` is the prefix of their names: `nvext.`.
        """
        for name, value in (further or {}).items():
            if value is None or name in self.harmless:
                continue
            refusal = self.refused.get(name)
            if refusal is not None:
                if refusal.permits(value):
                    continue
                raise unsupported(at + name, refusal.reason)
            if len(name) > _LONGEST_NAME:
                raise invalid(f"Unknown parameter: '{at}{name[:_LONGEST_NAME]}…'.", code="unknown_parameter")
            written = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower().replace("-", "_")
            known = {*fields, *self.refused, *self.harmless}
            alike = difflib.get_close_matches(written, known, n=1, cutoff=_LEAST_LIKENESS)
            hint = f" Did you mean '{at}{alike[0]}'?" if alike else ""
            raise invalid(f"Unknown parameter: '{at}{name}'.{hint}", at + name, "unknown_parameter")


def unsupported(name: str, reason: str) -> ApiError:
    """Make the 400 for a parameter that cannot be served."""
    return invalid(f"Unsupported parameter: '{name}': {reason}.", name, "unsupported_parameter")


# --------------------------------------------------------------------------- both bodies

_OFF = (False,)
_NO = Refusal(neutral=_OFF)
_LOGPROBS = Refusal("log probabilities are those of the answer's tokens", _OFF)
_ROUTING = Refusal("which worker answers is the router's choice")
_EXPERTS = Refusal("expert routing is not returned", (False, 0))
_TEMPLATE_VARIABLE = Refusal("give it in 'chat_template_kwargs'")
_MEDIA_OPTIONS = "engines read images and the like by options of their own"
_MEDIA = Refusal(_MEDIA_OPTIONS, (False,))
_LORA = Refusal("an adapter is asked for by the name of its model")
_PREPARED = Refusal("send token ids as 'prompt' to /v1/completions")
_REQUEST_ID = Refusal("give it as the header x-request-id")
_BEAMS = "beam search is not supported by this server"

_REFUSED: Final[Mapping[str, Refusal]] = {
    # OpenAI's
    "service_tier": Refusal("there is one tier", ("auto", "default")),
    # vLLM's
    "use_beam_search": Refusal(_BEAMS, _OFF),
    "length_penalty": Refusal(_BEAMS, (1, 1.0)),
    "early_stopping": Refusal(_BEAMS, _OFF),
    "skip_special_tokens": Refusal("the text of special tokens is never shown", (True,)),
    "prompt_logprobs": _LOGPROBS,
    "logprob_token_ids": _LOGPROBS,
    "return_tokens_as_token_ids": _LOGPROBS,
    "return_token_ids": Refusal("answers are text", _OFF),
    "return_token_offsets": _NO,
    "return_prompt_text": _NO,
    "return_mm_kwargs": Refusal(neutral=(True, False)),
    "truncate_prompt_tokens": Refusal("a prompt that is too long is refused"),
    "truncation_side": Refusal("a prompt that is too long is refused"),
    "detokenize": Refusal("answers are text", (True,)),
    "watermarking": _NO,
    "repetition_detection": Refusal(),
    "logits_processors": Refusal(neutral=([],)),
    "request_id": _REQUEST_ID,
    "session_id": Refusal(),
    "kv_transfer_params": Refusal(neutral=({},)),
    "ec_transfer_params": Refusal(neutral=({},)),
    "vllm_xargs": Refusal(neutral=({},)),
    "stream_interval": Refusal("each token is sent as it comes", (1,)),
    "routed_experts_prompt_start": _EXPERTS,
    "mm_processor_kwargs": Refusal(_MEDIA_OPTIONS, ({},)),
    "media_io_kwargs": Refusal(_MEDIA_OPTIONS, ({},)),
    "guided_decoding_backend": Refusal("the engine has its own"),
    "guided_decoding_disable_fallback": _NO,
    "guided_decoding_disable_any_whitespace": _NO,
    "guided_decoding_disable_additional_properties": _NO,
    # SGLang's
    "return_hidden_states": _NO,
    "return_routed_experts": _EXPERTS,
    "routed_experts_start_len": _EXPERTS,
    "return_cached_tokens_details": Refusal("usage has their number", _OFF),
    "return_prompt_token_ids": Refusal("answers are text", _OFF),
    "return_meta_info": _NO,
    "stop_regex": Refusal("use 'stop'", ([],)),
    "lora_path": _LORA,
    "lora_name": _LORA,
    "session_params": Refusal(neutral=({},)),
    "custom_params": Refusal(neutral=({},)),
    "custom_logit_processor": Refusal(),
    "custom_labels": Refusal(neutral=({},)),
    "images_config": Refusal(_MEDIA_OPTIONS, ({},)),
    "bootstrap_host": _ROUTING,
    "bootstrap_port": _ROUTING,
    "bootstrap_room": _ROUTING,
    "routed_dp_rank": _ROUTING,
    "disagg_prefill_dp_rank": _ROUTING,
    "data_parallel_rank": _ROUTING,
    "rid": _REQUEST_ID,
    "extra_key": Refusal("use 'cache_salt'"),
    "ngram_corpus_id": Refusal(),
    # Dynamo's
    "dp_rank": _ROUTING,
    "router_config_override": Refusal("use 'nvext.router_config_override'"),
    # Other servers' names of parameters that exist here.
    "max_new_tokens": Refusal("use 'max_tokens'"),
    "max_output_tokens": Refusal("use 'max_tokens'"),
    "max_length": Refusal("use 'max_tokens'"),
    "n_predict": Refusal("use 'max_tokens'"),
    "num_predict": Refusal("use 'max_tokens'"),
    "stop_sequences": Refusal("use 'stop'"),
    "repeat_penalty": Refusal("use 'repetition_penalty'"),
    "grammar": Refusal("use 'guided_grammar'"),
}

_HARMLESS: Final[Mapping[str, str]] = {
    "user": "names the end user",
    "metadata": "labels of the client's own",
    "store": "nothing is kept, and there is no way to ask for it",
    "safety_identifier": "names the end user",
    "prompt_cache_key": "the router finds cached prompts by their tokens",
    "prompt_cache_retention": "how long blocks stay is the engine's choice",
    "prompt_cache_options": "how long blocks stay is the engine's choice",
    "prediction": "makes an answer faster, and never another",
    "spaces_between_special_tokens": "the text of special tokens is never shown",
}

CHAT: Final = Parameters(
    refused={
        **_REFUSED,
        "echo": Refusal("the prompt is not returned", _OFF),
        "modalities": Refusal("answers are text", (["text"],)),
        "audio": Refusal("answers are text", (False,)),
        "functions": Refusal("use 'tools'", ([],)),
        "function_call": Refusal("use 'tools'", ("none", "auto")),
        "web_search_options": Refusal(),
        "moderation": Refusal(),
        "verbosity": Refusal("say it in a message", ("medium",)),
        "chat_template": Refusal("the model's own template is used"),
        "include_reasoning": Refusal("use 'separate_reasoning'", (True,)),
        "stream_reasoning": Refusal("reasoning is sent as it comes", (True,)),
        "task": Refusal(),
        "input_ids": _PREPARED,
        "max_dynamic_patch": _MEDIA,
        "min_dynamic_patch": _MEDIA,
        "use_audio_in_video": _MEDIA,
        "reasoning": Refusal("use 'reasoning_effort'"),
        "thinking": _TEMPLATE_VARIABLE,
        "enable_thinking": _TEMPLATE_VARIABLE,
    },
    harmless=_HARMLESS,
)

TEXT: Final = Parameters(
    refused={
        **_REFUSED,
        "suffix": Refusal(neutral=("",)),
        "prompt_embeds": Refusal("send text or token ids"),
    },
    harmless=_HARMLESS,
)

EMBEDDINGS: Final = Parameters(
    refused={
        "stream": Refusal("embeddings are sent whole", _OFF),
        "messages": Refusal("send a text or token ids as 'input'"),
        "prompt": Refusal("use 'input'"),
        "encoding": Refusal("use 'encoding_format'"),
        # vLLM's
        "truncate_prompt_tokens": _REFUSED["truncate_prompt_tokens"],
        "truncation_side": _REFUSED["truncation_side"],
        "embed_dtype": Refusal("numbers are those of float32", ("float32",)),
        "endianness": Refusal("base64 is little-endian", ("native", "little")),
        "use_activation": Refusal("the model's own pooler decides", (True,)),
        "normalize": Refusal("the model's own pooler decides", (True,)),
        "priority": Refusal(neutral=(0,)),
        "cache_salt": Refusal("embeddings share no blocks"),
        "request_id": _REQUEST_ID,
        "mm_processor_kwargs": _REFUSED["mm_processor_kwargs"],
        "chat_template": Refusal("send a text or token ids as 'input'"),
        "chat_template_kwargs": Refusal("send a text or token ids as 'input'", ({},)),
        # SGLang's
        "rid": _REQUEST_ID,
        "lora_path": _LORA,
        # Dynamo's
        "nvext": Refusal(neutral=({},)),
    },
    harmless={name: _HARMLESS[name] for name in ("user", "metadata", "safety_identifier")},
)

REFUSED_HEADERS: Final = frozenset(
    (
        b"x-worker-instance-id",
        b"x-prefill-instance-id",
        b"x-dp-rank",
        b"x-prefill-dp-rank",
        b"x-data-parallel-rank",
    )
)
"""Headers by which Dynamo's and vLLM's servers let a client choose a worker."""


def check_headers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise ApiError for a header that cannot be served."""
    for name, _ in headers:
        if name in REFUSED_HEADERS:
            raise unsupported(str(name, "ascii"), _ROUTING.reason)


# --------------------------------------------------------------------------- objects within them

NVEXT: Final = Parameters(
    refused={
        "use_raw_prompt": Refusal("use /v1/completions", _OFF),
        "annotations": Refusal(
            "streams carry chunks alone: use 'nvext.extra_fields', or /tokenize for the prompt's tokens",
            ([],),
        ),
        "prefill_worker_id": _ROUTING,
        "decode_worker_id": _ROUTING,
        "dp_rank": _ROUTING,
        "prefill_dp_rank": _ROUTING,
        "token_data": _PREPARED,
        "agent_hints": Refusal(neutral=({},)),
        "session_control": Refusal(),
        "request_timestamp_ms": Refusal("requests begin when they come"),
        "guided_decoding_backend": Refusal("the engine has its own"),
    },
)

STREAM_OPTIONS: Final = Parameters(
    refused={
        "include_obfuscation": Refusal("chunks are not padded", _OFF),
    },
)

RESPONSE_FORMAT: Final = Parameters(
    refused={
        "schema": Refusal("give it as 'json_schema.schema', with the type json_schema"),
        "json_schema": Refusal("it goes with the type json_schema"),
    },
)

JSON_SCHEMA: Final = Parameters(refused={})

STRUCTURED_OUTPUTS: Final = Parameters(
    refused={
        "disable_fallback": _NO,
        "disable_any_whitespace": Refusal("use 'whitespace_pattern'", _OFF),
        "disable_additional_properties": Refusal("say it in the schema", _OFF),
    },
)
