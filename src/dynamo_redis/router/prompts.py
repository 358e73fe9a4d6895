"""Reads from a request the prompt, the names of its blocks, and the weights of its choice. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dynamo_redis.errors import InvalidRequest
from dynamo_redis.events.block_hashes import SEED, chain, local_hashes, lora_seed, media_seed, salted_seed
from dynamo_redis.router.base import CostWeights

OVERRIDE = "router_config_override"
"""The key of a request under which it brings weights of its own, as in Dynamo."""

_WEIGHTS = {
    "overlap_score_credit": "overlap_score_credit",
    "overlap_score_weight": "overlap_score_credit",  # the older name
    "prefill_load_scale": "prefill_load_scale",
    "router_temperature": "temperature",
}


def token_ids_of(request: Any) -> Sequence[Any]:
    """Return the prompt of a generate request; of one for embeddings, its inputs. Raises InvalidRequest."""
    token_ids = request.get("token_ids") if isinstance(request, dict) else None
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, str | bytes):
        raise InvalidRequest(
            "a request that is routed by its prompt must have `token_ids`, a list of integers"
        )
    return token_ids


def prompt_size(request: Any, block_size: int) -> tuple[list[int], int]:
    """Return the sequence hashes of the whole blocks of a request's prompt, and the number of its tokens.

    The inputs of a request for embeddings count as one prompt whose blocks have no names: they are a load,
    and share nothing. Raises InvalidRequest.
    """
    token_ids = token_ids_of(request)
    if token_ids and isinstance(token_ids[0], list):
        try:
            return [], sum(map(len, token_ids))
        except TypeError as exc:
            raise InvalidRequest("`token_ids` is neither a prompt nor a list of inputs") from exc
    marks = (request.get(name) for name in ("lora_name", "cache_salt", "media_digest"))
    return block_hashes(token_ids, block_size, *marks), len(token_ids)


def block_hashes(
    token_ids: Sequence[int],
    block_size: int,
    lora_name: str | None = None,
    cache_salt: str | None = None,
    media_digest: str | None = None,
) -> list[int]:
    """Return the sequence hashes of a prompt's whole blocks, as requests with the same adapter, salt and
    images share them: placeholders of other images have the same tokens. Raises InvalidRequest."""
    for name, given in (("lora_name", lora_name), ("cache_salt", cache_salt), ("media_digest", media_digest)):
        if given is not None and not isinstance(given, str):
            raise InvalidRequest(f"{name} must be a string")
    seed = SEED if lora_name is None else lora_seed(lora_name)
    if cache_salt:
        seed = salted_seed(cache_salt, seed)
    if media_digest is not None:
        seed = media_seed(media_digest, seed)
    try:
        return chain(local_hashes(token_ids, block_size, seed=seed), seed=seed)
    except (TypeError, OverflowError) as exc:
        raise InvalidRequest(f"token_ids: not token ids: {exc}") from exc


def weights_of(request: Mapping[str, Any], default: CostWeights) -> CostWeights:
    """Return the default weights with those that the request brings. Raises InvalidRequest."""
    override = request.get(OVERRIDE)
    if not override:
        return default
    if not isinstance(override, dict):
        raise InvalidRequest(f"{OVERRIDE} must be a map of weights")
    given: dict[str, float] = {}
    for name, value in override.items():
        field = _WEIGHTS.get(name)
        if field is None:
            raise InvalidRequest(f"{OVERRIDE}: {name!r} is none of {', '.join(_WEIGHTS)}")
        if value is None:
            continue
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise InvalidRequest(f"{OVERRIDE}: {name} must be a number that is not negative")
        given[field] = float(value)
    return replace(default, **given)
