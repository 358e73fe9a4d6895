"""What frontend and worker say to each other: tokens in, tokens out.

Plain dicts, as msgpack carries them; the names are those of Dynamo's preprocessed request and engine
output, so that an engine written for one fits the other. A receiver ignores keys it does not know. An engine
that knows an option and cannot do it refuses the request, by the option's name, with InvalidRequest.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict, TypeGuard

FinishReason = Literal["stop", "length", "content_filter", "error", "cancelled"]
"""Why an answer ended. A receiver takes any other word, but "error" with something behind it, for "stop"."""


class StopConditions(TypedDict, total=False):
    """When to end. The worker ends at token level; stop strings are found by the frontend. Without
    `max_tokens` the engine's own limit applies, at most what its context leaves.

    `max_thinking_tokens` bounds what a reasoning model thinks before it answers.
    """

    max_tokens: int
    min_tokens: int
    stop: list[str]
    stop_token_ids_hidden: list[int]
    ignore_eos: bool
    max_thinking_tokens: int


GUIDED_BY = "response_format, structured_outputs, guided_json or the like"
"""The client's own name for `guided_decoding`, for a refusal of it."""


class GuidedDecoding(TypedDict, total=False):
    """A form that the answer must have: exactly one of `json`, `regex`, `choice`, `grammar` and
    `structural_tag` is there.

    `json` is a JSON schema, as an object; `{"type": "object"}` where any object will do. `whitespace_pattern`
    goes with it: a regular expression for the white space between its tokens.
    """

    json: dict[str, Any]
    regex: str
    choice: list[str]
    grammar: str
    structural_tag: dict[str, Any]
    whitespace_pattern: str


class SamplingOptions(TypedDict, total=False):
    """Rules for the choice of tokens; all optional, engine defaults apply.

    `logit_bias` maps token ids, written in decimal, to what is added to their logits. With
    `include_stop_str_in_output` the engine's text, where it sends text, keeps the stop string it ended at.
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


class GenerateRequest(TypedDict):
    """A request to a worker's `generate` endpoint. `dp_rank` is the data-parallel rank that is to answer it;
    without, the worker takes one."""

    model: str
    token_ids: list[int]
    stop_conditions: StopConditions
    sampling_options: SamplingOptions
    eos_token_ids: list[int]
    annotations: NotRequired[list[str]]
    dp_rank: NotRequired[int]


class CompletionUsage(TypedDict, total=False):
    """Token counts of the engine itself."""

    prompt_tokens: int
    completion_tokens: int


class GenerateItem(TypedDict, total=False):
    """One item of the answer: new tokens, and on the last item why it ended.

    `cached_tokens` says how many prompt tokens the engine found in its KV cache: on the first item, or on the
    last by engines that say it only then.
    A hidden stop token (EOS) is not among `token_ids`. `completion_usage`, on the last item, is what the
    engine counted, where it counts otherwise than by `token_ids`.
    """

    token_ids: list[int]
    finish_reason: FinishReason | None
    cached_tokens: int
    completion_usage: CompletionUsage


def is_count(value: object) -> TypeGuard[int]:
    """Tell whether a number of tokens, as an engine or worker says it, is one: an integer from 0 on."""
    return type(value) is int and 0 <= value < 1 << 53
