"""A request to the mock engine, as the sequence that its batch computes."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from itertools import chain as chain_tokens
from itertools import islice
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.engines.mock.kv_cache import BlockTable
from dynamo_redis.engines.mock.rank import StreamedSequence
from dynamo_redis.engines.mock.scripts import Scripts
from dynamo_redis.engines.text import Phrasebook
from dynamo_redis.errors import InvalidRequest
from dynamo_redis.events.block_hashes import SEED, chain, local_hashes, salted_seed

_REFUSED_OPTIONS: Final = ("logit_bias", "allowed_token_ids", "bad_words")
"""Sampling options that restrict the tokens of an answer."""


def read_request(
    request: object,
    phrasebook: Phrasebook,
    scripts: Scripts,
    settings: MockEngineSettings,
    context_length: int,
) -> StreamedSequence:
    """Return the sequence of a request. Raises InvalidRequest if the request cannot be served."""
    if not isinstance(request, Mapping):
        raise InvalidRequest(f"a request is an object, not {type(request).__name__}")
    token_ids = request.get("token_ids")
    try:
        prompt = array("I", token_ids if isinstance(token_ids, (list, tuple)) else ())
    except (TypeError, OverflowError) as exc:
        raise InvalidRequest(f"token_ids are not all token ids: {exc}") from exc
    if not prompt:
        raise InvalidRequest("token_ids must be a non-empty list of token ids")
    room_count = min(context_length, settings.total_kv_blocks * settings.block_size) - len(prompt)
    if room_count < 1:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens, and no room for an answer: this worker holds at most "
            f"{room_count + len(prompt)} (context length {context_length}, KV cache "
            f"{settings.total_kv_blocks} blocks of {settings.block_size})"
        )
    stop = _mapping(request, "stop_conditions")
    sampling = _mapping(request, "sampling_options")
    output = _mapping(request, "output_options")
    for name in _REFUSED_OPTIONS:
        if sampling.get(name):
            raise InvalidRequest(f"the mock engine has no model, and cannot hold an answer to {name!r}")
    salt = request.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise InvalidRequest("cache_salt must be a string that is not empty")
    seed_of_blocks = salted_seed(salt) if salt else SEED
    wants_logprobs = output.get("logprobs") is not None
    answered_count = _integer(request, "answered_count", default=0, least=0)
    if answered_count >= len(prompt):
        raise InvalidRequest(f"answered_count={answered_count} leaves no prompt of {len(prompt)} tokens")
    max_tokens = _integer(stop, "max_tokens", default=room_count, least=1)
    seed = _integer(sampling, "seed", default=0, least=-(1 << 63)) if sampling.get("temperature") != 0 else 0
    unanswered = prompt[: len(prompt) - answered_count]
    key = xxh3_64_intdigest(unanswered.tobytes(), seed & (1 << 64) - 1)
    ignore_eos = bool(stop.get("ignore_eos"))
    try:
        eos_ids = frozenset(() if ignore_eos else request.get("eos_token_ids") or ())
        stop_ids = eos_ids | frozenset(stop.get("stop_token_ids_hidden") or ())
    except TypeError as exc:
        raise InvalidRequest(f"stop token ids are not a list of token ids: {exc}") from exc
    text, length = phrasebook.tokens(key), phrasebook.length(key)
    script = scripts.answer(unanswered, sampling.get("guided_decoding"))
    if script is not None:
        text, length = chain_tokens(script, text), len(script)
    return StreamedSequence(
        tokens=prompt,
        prompt_count=len(prompt),
        hashes=chain(local_hashes(prompt, settings.block_size, seed=seed_of_blocks), seed=seed_of_blocks),
        blocks=BlockTable(cache_salt=salt),
        text=islice(text, answered_count, None),
        natural_length=room_count if ignore_eos else max(length - answered_count, 0),
        min_tokens=_integer(stop, "min_tokens", default=0, least=0),
        max_tokens=min(max_tokens, room_count),
        stop_ids=stop_ids,
        top_count=_integer(output, "logprobs", default=-1, least=0) if wants_logprobs else None,
    )


def _mapping(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = request.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be an object, not {type(value).__name__}")
    return value


def _integer(options: Mapping[str, Any], name: str, *, default: int, least: int) -> int:
    value = options.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidRequest(f"{name}={value!r} must be a whole number of at least {least}")
    return value
