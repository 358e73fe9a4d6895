"""The messages between frontend and worker: tokens in, tokens out.

They are plain dicts, sent as msgpack. The names are those of Dynamo's preprocessed request and engine output,
so that an engine written for Dynamo works here, too. A receiver ignores keys that it does not know. An engine
that knows an option and does not support it refuses the request with InvalidRequest, which names the option.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict, TypeGuard

FinishReason = Literal["stop", "length", "content_filter", "error", "cancelled"]
"""The reason why an answer ended.

A receiver treats any other word as "stop", unless it begins with "error".
"""


class StopConditions(TypedDict, total=False):
    """The conditions that end an answer.

    The worker checks the token conditions, the frontend the stop strings. Without `max_tokens` the engine's
    own limit applies, at most the rest of its context. `max_thinking_tokens` limits the reasoning of a model
    before its answer.
    """

    max_tokens: int
    min_tokens: int
    stop: list[str]
    stop_token_ids_hidden: list[int]
    ignore_eos: bool
    max_thinking_tokens: int


GUIDED_BY = "response_format, structured_outputs, guided_json or the like"
"""The clients' names for `guided_decoding`, for the message of a refusal."""


class GuidedDecoding(TypedDict, total=False):
    """The form that the answer must have: exactly one of `json`, `regex`, `choice`, `grammar` and
    `structural_tag` is present.

    `json` is a JSON schema, as an object; `{"type": "object"}` allows any object. With it,
    `whitespace_pattern` is a regular expression for the white space between JSON tokens.
    """

    json: dict[str, Any]
    regex: str
    choice: list[str]
    grammar: str
    structural_tag: dict[str, Any]
    whitespace_pattern: str


class SamplingOptions(TypedDict, total=False):
    """Options of the choice of tokens. Without one, the engine's default applies.

    `logit_bias` maps token ids, written in decimal, to the values added to their logits. With
    `include_stop_str_in_output` an engine that sends text keeps the stop string that ended it.
    """

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    logit_bias: dict[str, float]
    allowed_token_ids: list[int]
    bad_words: list[str]
    include_stop_str_in_output: bool
    guided_decoding: GuidedDecoding


class OutputOptions(TypedDict, total=False):
    """Options of the items of an answer. With `logprobs` each item has the log probabilities of its tokens,
    and of this many of the likeliest tokens at each place."""

    logprobs: int


class GenerateRequest(TypedDict):
    """A request to a worker's `generate` endpoint.

    Blocks of KV cache are shared only by requests with the same `cache_salt`, or without one. `priority` is
    for the engine's scheduler; its sign is the engine's. A request with a `backend_instance_id` goes to that
    instance; `router_config_override` has weights of the KV-aware router for this request.
    `dp_rank` is the data-parallel rank that has to answer it; without it, the worker chooses one.
    `answered_count` says that this many tokens at the end of `token_ids` are the beginning of the answer,
    given by a worker that was lost: `stop_conditions` count from there on.
    `chat` is a conversation with images or the like, for an engine that reads it in place of `token_ids`, in
    which placeholders stand for them: `messages`, and if they matter `tools`, `documents` and options of the
    chat template, each as JSON. `media_digest` is the digest of its images, which keeps its blocks of KV
    cache apart as a `cache_salt` does.
    """

    model: str
    token_ids: list[int]
    stop_conditions: StopConditions
    sampling_options: SamplingOptions
    eos_token_ids: list[int]
    output_options: NotRequired[OutputOptions]
    cache_salt: NotRequired[str]
    priority: NotRequired[int]
    backend_instance_id: NotRequired[int]
    router_config_override: NotRequired[dict[str, float]]
    annotations: NotRequired[list[str]]
    dp_rank: NotRequired[int]
    answered_count: NotRequired[int]
    chat: NotRequired[Mapping[str, bytes | memoryview]]
    media_digest: NotRequired[str]


class EmbeddingRequest(TypedDict):
    """A request to the `generate` endpoint of a worker that makes embeddings.

    `token_ids` has the tokens of each input. `dimensions` is the length of the vectors, if the client wants
    another than the model's own. `encoding_format`, `float` or `base64`, is the client's: a worker may send
    vectors in either form. `input` has the inputs as they came, texts or token ids, for workers that take
    text (`model_input` `text`).
    """

    model: str
    token_ids: list[list[int]]
    encoding_format: Literal["float", "base64"]
    dimensions: NotRequired[int]
    input: NotRequired[list[str | list[int]]]


class EmbeddingItem(TypedDict, total=False):
    """One item of the answer to an `EmbeddingRequest`: the vectors of the next inputs, in order.

    A vector is a list of numbers, or base64 of its numbers as little-endian float32. One item may have all
    vectors. The counts are those of its own inputs. Workers may also send OpenAI's form: `data`, a list of
    objects with `embedding` and `index`, and `usage`.
    """

    embeddings: list[list[float] | str]
    prompt_tokens: int
    total_tokens: int


class CompletionUsage(TypedDict, total=False):
    """Token counts by the engine."""

    prompt_tokens: int
    completion_tokens: int


class TopLogprob(TypedDict, total=False):
    """One of the likeliest tokens at a place. `rank` is 1 for the likeliest."""

    token_id: int
    logprob: float
    rank: int
    token: str


class GenerateItem(TypedDict, total=False):
    """One item of the answer: new tokens, and in the last item the reason of the end.

    `cached_tokens` is the number of prompt tokens that the engine found in its KV cache: in the first item,
    or in the last item for engines that report it only there. A hidden stop token (EOS) is not in
    `token_ids`. `log_probs` and `top_logprobs` have an entry for each of `token_ids`, if the request asks for
    them. `completion_usage`, in the last item, has the engine's counts if they differ from those of
    `token_ids`.
    """

    token_ids: list[int]
    finish_reason: FinishReason | None
    cached_tokens: int
    completion_usage: CompletionUsage
    log_probs: list[float]
    top_logprobs: list[list[TopLogprob]]


def is_count(value: object) -> TypeGuard[int]:
    """Return whether a value from an engine or a worker is a valid number of tokens: an integer from 0 on."""
    return type(value) is int and 0 <= value < 1 << 53
