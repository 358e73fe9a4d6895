"""From a body to what workers get: prompts rendered, tokenized, held against the context."""

from __future__ import annotations

import asyncio
import os
import secrets
from array import array
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from weakref import WeakKeyDictionary

from dynamo_redis.frontend.http.bodies import Body, Prompt, Text
from dynamo_redis.frontend.http.body_reader import BodyReader
from dynamo_redis.frontend.http.errors import ApiError, context_length_exceeded, invalid
from dynamo_redis.frontend.model_loading import LoadedModel
from dynamo_redis.frontend.openai import ChatBody, TextBody
from dynamo_redis.frontend.options import CompletionOptions
from dynamo_redis.frontend.tokens import Tokenizer
from dynamo_redis.models.llm_protocol import GenerateRequest, SamplingOptions, StopConditions

INLINE_BYTES = 1024
"""Texts up to this size (at most some 200 tokens, under a millisecond) are tokenized on the event loop,
unless the tokenizer has expressions of its own."""

LARGE_BYTES = 64 * 1024
"""Texts over this size are tokenized apart from those below, so that these need not wait for them."""

PROBE_CHARS = 8
"""A text longer than this for each token of the context is first tokenized up to there, then up to twice as
far, and so on: tokenizing takes some 50 bytes a byte of text, so that a body at its limit would take
gigabytes only to be refused."""
_PROBE_SLACK_TOKENS = 64  # where a text is cut, its last token can fall into several

MOST_CHARS = 64
"""A text longer than this for each token of the context is refused without being tokenized to its end, and a
conversation without being rendered."""


class Preparation:
    """Turns bodies into requests: reads them, renders their templates, makes token ids of the texts.

    The event loop does what is small. Threads tokenize, which lets the loop run meanwhile: threads of the
    model, since the expressions of a tokenizer may take any time, and others for its large texts. Their
    queues hold at most one entry for each open HTTP request.
    """

    def __init__(self, max_body_bytes: int = 45 << 20) -> None:
        self._threads: WeakKeyDictionary[Tokenizer, tuple[Executor, Executor]] = WeakKeyDictionary()
        self._reader = BodyReader(max_body_bytes)

    async def aclose(self) -> None:
        """End the threads, once they are idle, and the processes."""
        for executors in self._threads.values():
            for executor in executors:
                executor.shutdown(wait=False, cancel_futures=True)
        await self._reader.aclose()

    async def read(self, kind: type[CompletionOptions], content: list[bytearray]) -> Body:
        """Read and check a body, which is in pieces, and is let go of. Raises ApiError."""
        return await self._reader.read(kind, content)

    async def requests(self, model: LoadedModel, body: Body) -> list[GenerateRequest]:
        """One request for each choice wanted: `n` for the first prompt, then for the next.

        Raises ApiError for what the model cannot do, TemplateError, and Overloaded.
        """
        options = body.options
        prompts = await self._prompts(model, body)
        size = sum(map(len, prompts))
        if size <= INLINE_BYTES and not model.tokenizer.has_expressions:
            tokenized = tokenize(model, options, prompts)
        else:
            loop = asyncio.get_running_loop()
            executor = self._threads_of(model.tokenizer)[size > LARGE_BYTES]
            tokenized = await loop.run_in_executor(executor, tokenize, model, options, prompts)
        seeds = _seeds(options)
        return [request for ids in tokenized for request in _requests_for(ids, model, options, seeds)]

    def _threads_of(self, tokenizer: Tokenizer) -> tuple[Executor, Executor]:
        """The threads that tokenize for a model, and those that do it with large texts."""
        if tokenizer not in self._threads:
            count = os.cpu_count() or 1
            self._threads[tokenizer] = (
                ThreadPoolExecutor(count, thread_name_prefix="prompt"),
                ThreadPoolExecutor(count, thread_name_prefix="large-prompt"),
            )
        return self._threads[tokenizer]

    async def _prompts(self, model: LoadedModel, body: Body) -> list[Prompt]:
        if isinstance(body.source, list):
            return body.source
        if model.template is None:
            raise invalid(
                f"The model `{model.name}` has no chat template: use /v1/completions.",
                "model",
                "unsupported_model",
            )
        if len(body.source) > MOST_CHARS * model.context_length:
            raise _too_long(body.options, model.context_length + 1, None, model.context_length, at_least=True)
        return [await model.template.render(body.source)]


def tokenize(model: LoadedModel, body: CompletionOptions, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Prompts as token ids; a chat has one, the text that its template made. Raises ApiError."""
    if isinstance(body, ChatBody):
        [text] = prompts
        assert not isinstance(text, (list, array))
        token_ids = _encode(model, body, text, add_special_tokens=bool(body.add_special_tokens))
        if not token_ids:
            raise invalid("The chat template makes an empty prompt of the messages.", "messages")
        return [token_ids]
    assert isinstance(body, TextBody)
    if not model.completes_text:
        raise invalid(
            f"The model `{model.name}` takes conversations only: use /v1/chat/completions.",
            "model",
            "unsupported_model",
        )
    return [_tokenize_text(model, body, prompt, index) for index, prompt in enumerate(prompts)]


def _encode(
    model: LoadedModel, body: CompletionOptions, text: Text, *, add_special_tokens: bool = False
) -> list[int]:
    """Token ids of a text. Raises ApiError for one that the context cannot hold, as soon as that is known."""
    context_length = model.context_length
    size = PROBE_CHARS * context_length
    while size < len(text):
        count = len(model.tokenizer.encode(_start(text, size))) - _PROBE_SLACK_TOKENS
        if count > context_length:
            raise _too_long(body, count, None, context_length, at_least=True)
        if size > MOST_CHARS * context_length:
            raise _too_long(body, context_length + 1, None, context_length, at_least=True)
        size *= 2
    return model.tokenizer.encode(_start(text, size), add_special_tokens=add_special_tokens)


def _start(text: Text, size: int) -> str:
    """The beginning of a text, without a character that is cut."""
    if isinstance(text, str):
        return text[:size]
    return bytes(text[:size]).decode(errors="ignore")


def _tokenize_text(model: LoadedModel, body: TextBody, prompt: Prompt, index: int) -> list[int]:
    if not isinstance(prompt, (list, array)):
        special = body.add_special_tokens is not False
        token_ids = _encode(model, body, prompt, add_special_tokens=special)
        if not token_ids:
            raise invalid("The prompt is empty.", "prompt")
        return token_ids
    if len(prompt) > model.context_length:
        raise _too_long(body, len(prompt), None, model.context_length)
    largest = max(prompt)
    if largest >= model.tokenizer.vocabulary_size:
        raise invalid(
            f"Token id {largest} of prompt {index} is not in the model's vocabulary of "
            f"{model.tokenizer.vocabulary_size}.",
            "prompt",
        )
    return list(prompt)


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
    """Return the sampling options for the worker. Raises ApiError for tokens that the model does not have."""
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
    conditions = StopConditions(ignore_eos=body.ignores_eos)
    if wanted is not None:  # else the limit is the engine's, which knows its own context best
        conditions["max_tokens"] = wanted
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
