"""Reads from a request the prompt, the names of its blocks, and the weights of its choice. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dynamo_redis.errors import InvalidRequest
from dynamo_redis.events.block_hashes import SEED, chain, local_hashes, lora_seed, salted_seed
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
    return block_hashes(token_ids, block_size, request.get("lora_name"), salt_of(request)), len(token_ids)


def block_hashes(
    token_ids: Sequence[int],
    block_size: int,
    lora_name: str | None = None,
    cache_salt: str | None = None,
) -> list[int]:
    """Return the sequence hashes of a prompt's whole blocks. Raises InvalidRequest for wrong token ids."""
    if lora_name is not None and not isinstance(lora_name, str):
        raise InvalidRequest("lora_name must be a string")
    seed = SEED if lora_name is None else lora_seed(lora_name)
    if cache_salt is not None and not isinstance(cache_salt, str):
        raise InvalidRequest("cache_salt must be a string")
    if cache_salt:
        seed = salted_seed(cache_salt, seed)
    try:
        return chain(local_hashes(token_ids, block_size, seed=seed), seed=seed)
    except (TypeError, OverflowError) as exc:
        raise InvalidRequest(f"token_ids: not token ids: {exc}") from exc


def salt_of(request: Mapping[str, Any]) -> str | None:
    """Return the salt of a request's blocks: its `cache_salt`, mixed with the digest of its images.

    Placeholders of other images have the same tokens. Raises InvalidRequest.
    """
    salt, digest = request.get("cache_salt"), request.get("media_digest")
    if digest is None:
        return salt
    if not isinstance(digest, str) or not isinstance(salt, str | None):
        raise InvalidRequest("cache_salt and media_digest must be strings")
    return f"{digest}\0{salt or ''}"


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
