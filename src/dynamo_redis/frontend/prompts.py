"""From a checked body to what workers get: prompts rendered, tokenized, held against the context."""

from __future__ import annotations

import asyncio
import os
import secrets
from concurrent.futures import ThreadPoolExecutor

from dynamo_redis.frontend.http_errors import ApiError, context_length_exceeded, invalid
from dynamo_redis.frontend.model_loading import LoadedModel
from dynamo_redis.frontend.openai import ChatBody, TextBody
from dynamo_redis.frontend.options import CompletionOptions
from dynamo_redis.runtime.llm_protocol import GenerateRequest, SamplingOptions, StopConditions

INLINE_BYTES = 1024
"""Bodies up to this size (at most some 200 tokens, under a millisecond) are tokenized on the event loop."""

PROBE_CHARS = 8
"""A text longer than this for each token of the context is first tokenized up to there. Tokenizing takes some
50 bytes a byte of text, so that a body at its limit would take gigabytes only to be refused."""
_PROBE_SLACK_TOKENS = 64  # where a text is cut, its last token can fall into several


class Preparation:
    """Turns bodies into requests, large ones in threads of its own.

    The threads' queue holds at most one entry for each open HTTP request.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="prompt")

    def close(self) -> None:
        """End the threads, once they are idle."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def requests(
        self, model: LoadedModel, body: CompletionOptions, size_bytes: int
    ) -> list[GenerateRequest]:
        """One request for each choice wanted: `n` for the first prompt, then for the next.

        Raises ApiError for what the model cannot do, and TemplateError.
        """
        if size_bytes <= INLINE_BYTES:
            prompts = tokenize(model, body)
        else:
            loop = asyncio.get_running_loop()
            prompts = await loop.run_in_executor(self._executor, tokenize, model, body)
        return [request for prompt in prompts for request in _requests_for(prompt, model, body, _seeds(body))]


def tokenize(model: LoadedModel, body: CompletionOptions) -> list[list[int]]:
    """The body's prompts as token ids. Raises ApiError and TemplateError."""
    if isinstance(body, ChatBody):
        return [_tokenize_chat(model, body)]
    assert isinstance(body, TextBody)
    if not model.completes_text:
        raise invalid(
            f"The model `{model.name}` takes conversations only: use /v1/chat/completions.",
            "model",
            "unsupported_model",
        )
    return [_tokenize_text(model, body, prompt, index) for index, prompt in enumerate(body.prompts)]


def _tokenize_chat(model: LoadedModel, body: ChatBody) -> list[int]:
    if model.template is None:
        raise invalid(
            f"The model `{model.name}` has no chat template: use /v1/completions.",
            "model",
            "unsupported_model",
        )
    text = model.template.render(
        [dict(message) for message in body.messages],
        # With `none` the model shall not call tools: it is not told of any.
        tools=None if body.tool_choice == "none" or not body.tools else [dict(tool) for tool in body.tools],
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        **body.template_variables(),
    )
    token_ids = _encode(model, body, text, add_special_tokens=bool(body.add_special_tokens))
    if not token_ids:
        raise invalid("The chat template makes an empty prompt of the messages.", "messages")
    return token_ids


def _encode(
    model: LoadedModel, body: CompletionOptions, text: str, *, add_special_tokens: bool = False
) -> list[int]:
    """Token ids of a text. Raises ApiError for one whose beginning alone fills the context."""
    start = text[: PROBE_CHARS * model.context_length]
    if len(start) < len(text):
        count = len(model.tokenizer.encode(start)) - _PROBE_SLACK_TOKENS
        if count > model.context_length:
            raise _too_long(body, count, None, model.context_length, at_least=True)
    return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _tokenize_text(model: LoadedModel, body: TextBody, prompt: str | list[int], index: int) -> list[int]:
    if isinstance(prompt, str):
        special = body.add_special_tokens is not False
        token_ids = _encode(model, body, prompt, add_special_tokens=special)
        if not token_ids:
            raise invalid("The prompt is empty.", "prompt")
        return token_ids
    largest = max(prompt)
    if largest >= model.tokenizer.vocabulary_size:
        raise invalid(
            f"Token id {largest} of prompt {index} is not in the model's vocabulary of "
            f"{model.tokenizer.vocabulary_size}.",
            "prompt",
        )
    return prompt


def _seeds(body: CompletionOptions) -> list[int | None]:
    """One for each choice, so that several choices of one prompt differ."""
    count = body.n or 1
    if count == 1:
        return [body.seed]
    first = body.seed if body.seed is not None else secrets.randbits(31)
    return [min(first + offset, 2**63 - 1) for offset in range(count)]


def _requests_for(
    prompt: list[int], model: LoadedModel, body: CompletionOptions, seeds: list[int | None]
) -> list[GenerateRequest]:
    conditions = _stop_conditions(prompt, model, body)
    sampling = _sampling_options(model, body)
    return [
        GenerateRequest(
            model=model.name,
            token_ids=prompt,
            stop_conditions=conditions,
            sampling_options=sampling if seed is None else {**sampling, "seed": seed},
            eos_token_ids=list(model.eos_token_ids),
        )
        for seed in seeds
    ]


def _sampling_options(model: LoadedModel, body: CompletionOptions) -> SamplingOptions:
    """What the worker is told. Raises ApiError for tokens that the model does not have."""
    sampling = body.sampling_options()
    size = model.tokenizer.vocabulary_size
    for name, token_ids in (
        ("allowed_token_ids", sampling.get("allowed_token_ids", [])),
        ("logit_bias", map(int, sampling.get("logit_bias", {}))),
    ):
        largest = max(token_ids, default=-1)
        if largest >= size:
            raise invalid(f"Token id {largest} is not in the model's vocabulary of {size}.", name)
    return sampling


def _stop_conditions(prompt: list[int], model: LoadedModel, body: CompletionOptions) -> StopConditions:
    left = model.context_length - len(prompt)
    wanted = body.wanted_tokens
    if left <= 0 or (wanted is not None and wanted > left):
        raise _too_long(body, len(prompt), wanted if left > 0 else None, model.context_length)
    conditions = StopConditions(max_tokens=left if wanted is None else wanted, ignore_eos=body.ignores_eos)
    if body.min_tokens:
        conditions["min_tokens"] = body.min_tokens
    if (thinking := body.thinking_budget()) is not None:
        conditions["max_thinking_tokens"] = thinking
    if body.stops:
        conditions["stop"] = body.stops
    if body.stop_token_ids:
        conditions["stop_token_ids_hidden"] = body.stop_token_ids
    return conditions


def _too_long(
    body: CompletionOptions,
    prompt_tokens: int,
    wanted: int | None,
    context_length: int,
    *,
    at_least: bool = False,
) -> ApiError:
    prompt_field = "messages" if isinstance(body, ChatBody) else "prompt"
    param = "max_tokens" if wanted is not None else prompt_field
    return context_length_exceeded(prompt_tokens, wanted, context_length, param, at_least=at_least)
