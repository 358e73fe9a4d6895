"""From a body to the workers' requests: prompts rendered, tokenized, checked against the context."""

from __future__ import annotations

import asyncio
import os
import secrets
from array import array
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import cast
from weakref import WeakKeyDictionary

from dynamo_redis.frontend.embedding_body import EmbeddingOptions, check_dimensions, embedding_input
from dynamo_redis.frontend.http.bodies import Body, Prompt, Text
from dynamo_redis.frontend.http.body_reader import BodyReader
from dynamo_redis.frontend.http.errors import ApiError, context_length_exceeded, invalid
from dynamo_redis.frontend.model_loading import LoadedModel
from dynamo_redis.frontend.openai import ChatBody, TextBody
from dynamo_redis.frontend.options import CompletionOptions, RequestBody
from dynamo_redis.frontend.tokens import Tokenizer
from dynamo_redis.models.llm_protocol import (
    EmbeddingRequest,
    GenerateRequest,
    SamplingOptions,
    StopConditions,
)
from dynamo_redis.templates.protocol import MaskedText

LARGE_BYTES = 64 * 1024
"""Texts over this size are tokenized in threads of their own, so that smaller ones do not wait for them."""

PROBE_CHARS = 8
"""If a text is longer than this for each token of the context, only that much of it is tokenized at first,
then twice as much, and so on. Tokenizing takes some 50 bytes of memory for each byte of text: a body at its
limit would take gigabytes only to be refused."""
_PROBE_SLACK_TOKENS = 64  # a cut text may end in several tokens in place of one

MOST_CHARS = 64
"""If a text is longer than this for each token of the context, it is refused without being tokenized to its
end; a conversation, without being rendered."""


EMBEDS_ONLY = "makes embeddings only: use /v1/embeddings"
"""The reason why a model of the type embedding does not serve another API."""


class Preparation:
    """Turns bodies into requests: parses them, renders their templates, tokenizes their texts.

    Small texts are tokenized on the event loop, others in threads. Each model has its own threads, since the
    regular expressions of a tokenizer may take any time, and further ones for large texts. The threads'
    queues hold at most one entry for each open HTTP request.
    """

    def __init__(self, max_body_bytes: int = 45 << 20) -> None:
        self._threads: WeakKeyDictionary[Tokenizer, tuple[Executor, Executor]] = WeakKeyDictionary()
        self._max_body_bytes = max_body_bytes
        self._reader = BodyReader(max_body_bytes)

    async def aclose(self) -> None:
        """End the threads, once they are idle, and the processes. Does not wait for the threads."""
        for executors in self._threads.values():
            for executor in executors:
                executor.shutdown(wait=False, cancel_futures=True)
        await self._reader.aclose()

    async def read(self, kind: type[RequestBody], content: list[bytearray]) -> Body:
        """Parse and check a body. Its pieces in `content` may be released. Raises ApiError."""
        return await self._reader.read(kind, content)

    async def requests(self, model: LoadedModel, body: Body) -> list[GenerateRequest]:
        """Return a request for each choice: `n` for the first prompt, then `n` for the next one.

        Each choice of a prompt has a seed of its own, so that they differ.

        Raises ApiError for a request that the model cannot serve, TemplateError, and Overloaded.
        """
        options = body.options
        _check_kind(model, options)
        tokenized = await self._tokenized(model, body)
        if isinstance(options, EmbeddingOptions):
            return [cast("GenerateRequest", _embedding_request(model, options, body, tokenized))]
        seeds = [options.seed]
        if (choice_count := options.n or 1) > 1:
            first = options.seed if options.seed is not None else secrets.randbits(31)
            seeds = [min(first + offset, 2**63 - 1) for offset in range(choice_count)]
        requests = []
        for token_ids in tokenized:
            conditions = _stop_conditions(token_ids, model, options, is_whole=body.media is None)
            routing = options.routing()
            sampling = _sampling_options(model, options)
            for seed in seeds:
                request = GenerateRequest(
                    model=model.name,
                    token_ids=token_ids,
                    stop_conditions=conditions,
                    sampling_options=sampling if seed is None else {**sampling, "seed": seed},
                    eos_token_ids=list(model.eos_token_ids),
                )
                request |= routing  # type: ignore[typeddict-item]
                if body.media is not None:
                    request |= {"chat": body.media.chat, "media_digest": body.media.digest}
                if options.wanted_logprobs is not None:
                    request["output_options"] = {"logprobs": options.wanted_logprobs}
                requests.append(request)
        return requests

    async def token_ids(self, model: LoadedModel, body: Body) -> list[list[int]]:
        """Return the tokens of each prompt. Raises ApiError, TemplateError, and Overloaded.

        Refuses a chat with images or the like: only its engine knows the number of their tokens. A prompt
        somewhat over the model's context is returned, too; one far over it is refused.
        """
        if body.media is not None:
            [place, *_] = body.media.places.values()
            raise invalid(
                f"Invalid value for '{place}': only an engine knows the number of tokens of such a part.",
                place,
                "unsupported_content",
            )
        return await self._tokenized(model, body)

    async def _tokenized(self, model: LoadedModel, body: Body) -> list[list[int]]:
        if body.media is not None:
            body.media.check(model.modalities, model.name, body.choice_count, self._max_body_bytes)
        prompts = await self._render_prompts(model, body)
        if body.media is not None and isinstance(prompts[0], MaskedText):
            # The engine tokenizes the texts of such a chat itself, and would take the name for the token.
            raise invalid(
                "A text of a chat with images, audio or video has the name of a special token.",
                "messages",
                "unsupported_content",
            )
        size = sum(map(len, prompts))
        if size <= model.tokenizer.inline_bytes and not isinstance(prompts[0], MaskedText):
            return tokenize(model, body.options, prompts)
        if model.tokenizer not in self._threads:
            count = os.cpu_count() or 1
            self._threads[model.tokenizer] = (
                ThreadPoolExecutor(count, thread_name_prefix="prompt"),
                ThreadPoolExecutor(count, thread_name_prefix="large-prompt"),
            )
        executor = self._threads[model.tokenizer][size > LARGE_BYTES]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(executor, tokenize, model, body.options, prompts)

    async def _render_prompts(self, model: LoadedModel, body: Body) -> list[Prompt]:
        if isinstance(body.source, list):
            return body.source
        if model.template is None:
            if model.embeds:
                raise _wrong_kind(model, EMBEDS_ONLY)
            raise _wrong_kind(model, "has no chat template: use /v1/completions")
        if len(body.source) > MOST_CHARS * model.context_length:
            raise _too_long(body.options, model.context_length + 1, None, model.context_length, at_least=True)
        return [await model.template.render(body.source)]


def _check_kind(model: LoadedModel, options: CompletionOptions) -> None:
    """Raise ApiError if the model makes embeddings and the request asks for an answer, or the reverse."""
    if model.embeds and not isinstance(options, EmbeddingOptions):
        raise _wrong_kind(model, EMBEDS_ONLY)
    if isinstance(options, EmbeddingOptions):
        if not model.embeds:
            path = "/v1/completions" if model.template is None else "/v1/chat/completions"
            raise _wrong_kind(model, f"makes no embeddings: use {path}")
        check_dimensions(options, model.name, matryoshka=model.matryoshka)


def _wrong_kind(model: LoadedModel, reason: str) -> ApiError:
    return invalid(f"The model `{model.name}` {reason}.", "model", "unsupported_model")


def _embedding_request(
    model: LoadedModel, options: EmbeddingOptions, body: Body, tokenized: list[list[int]]
) -> EmbeddingRequest:
    """Return the request for the embeddings of all inputs. Raises ApiError for an input over the context."""
    longest = max(map(len, tokenized))
    if longest > model.context_length:
        raise _too_long(options, longest, None, model.context_length)
    request = EmbeddingRequest(model=model.name, token_ids=tokenized, encoding_format=options.encoding_format)
    if options.dimensions is not None:
        request["dimensions"] = options.dimensions
    if model.takes_text:
        assert isinstance(body.source, list)
        request["input"] = embedding_input(body.source)
    return request


def tokenize(model: LoadedModel, body: CompletionOptions, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the token ids of each prompt. A chat has one prompt, its rendered text. Raises ApiError."""
    if isinstance(body, ChatBody):
        [text] = prompts
        assert not isinstance(text, (list, array))
        token_ids = _encode(model, body, text, add_special_tokens=bool(body.add_special_tokens))
        if not token_ids:
            raise invalid("The chat template makes an empty prompt of the messages.", "messages")
        return [token_ids]
    assert isinstance(body, TextBody)
    if not model.completes_text and not model.embeds:
        raise _wrong_kind(model, "takes conversations only: use /v1/chat/completions")
    tokenized = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, (list, array)):
            special = body.add_special_tokens is not False
            token_ids = _encode(model, body, prompt, add_special_tokens=special)
            if not token_ids:
                raise invalid("The prompt is empty.", "prompt")
            tokenized.append(token_ids)
            continue
        if len(prompt) > model.context_length:
            raise _too_long(body, len(prompt), None, model.context_length)
        largest = max(prompt)
        if largest >= model.tokenizer.vocabulary_size:
            raise invalid(
                f"Token id {largest} of prompt {index} is not in the model's vocabulary of "
                f"{model.tokenizer.vocabulary_size}.",
                "prompt",
            )
        tokenized.append(list(prompt))
    return tokenized


def _encode(
    model: LoadedModel, body: CompletionOptions, text: Text | MaskedText, *, add_special_tokens: bool = False
) -> list[int]:
    """Return the token ids of a text. Raises ApiError, as early as possible, if it exceeds the context."""
    context_length = model.context_length
    encode = model.tokenizer.encode
    if isinstance(text, MaskedText):
        encode = partial(model.tokenizer.encode_masked, mask=text.mask)
        text = text.text
    size = PROBE_CHARS * context_length
    while size < len(text):
        count = len(encode(_start(text, size))) - _PROBE_SLACK_TOKENS
        if count > context_length:
            raise _too_long(body, count, None, context_length, at_least=True)
        if size > MOST_CHARS * context_length:
            raise _too_long(body, context_length + 1, None, context_length, at_least=True)
        size *= 2
    return encode(_start(text, size), add_special_tokens=add_special_tokens)


def _start(text: Text, size: int) -> str:
    """Return the beginning of a text, without an incomplete character at its end."""
    if isinstance(text, str):
        return text[:size]
    return bytes(text[:size]).decode(errors="ignore")


def _sampling_options(model: LoadedModel, body: CompletionOptions) -> SamplingOptions:
    """Return the sampling options for the worker. Raises ApiError for tokens outside the vocabulary."""
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


def _stop_conditions(
    prompt: list[int], model: LoadedModel, body: CompletionOptions, *, is_whole: bool
) -> StopConditions:
    """Return the stop conditions for the worker. Raises ApiError if prompt and answer exceed the context.

    `is_whole`: all tokens of the prompt are here. Images take more of the context than their placeholders, so
    their engine bounds an answer that shall have as many tokens as fit.
    """
    left = model.context_length - len(prompt)
    wanted = body.wanted_tokens
    if body.fits_tokens and wanted is not None and wanted > left > 0:
        wanted = left if is_whole else None
    if left <= 0 or (wanted is not None and wanted > left):
        raise _too_long(body, len(prompt), wanted if left > 0 else None, model.context_length)
    conditions = StopConditions(ignore_eos=body.ignores_eos)
    if wanted is not None:  # else the engine limits the answer by its context
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
