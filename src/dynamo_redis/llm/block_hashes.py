"""`compute_block_hash_for_seq`: the names of a sequence's blocks, as Dynamo's routers compute them. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from xxhash import xxh3_64_intdigest

from dynamo_redis.events.block_hashes import (
    SEED,
    local_hashes,
    lora_seed,
    pack_names,
    pack_tokens,
    salted_seed,
)

MmInfo = Mapping[str, Any] | None
"""The media of a block: `{"mm_objects": [{"mm_hash": 5, "offsets": []}]}`; None or no objects: text only."""


def compute_block_hash_for_seq(
    tokens: Sequence[int],
    kv_block_size: int,
    block_mm_infos: Sequence[MmInfo] | None = None,
    lora_name: str | None = None,
    is_eagle: bool | None = None,
    cache_namespace: str | None = None,
) -> list[int]:
    """Return the hash of each whole block of a sequence: of its own tokens, not of those before it.

    Raises ValueError for a `kv_block_size` below 1 or malformed `block_mm_infos`; TypeError for tokens that
    are no integers, OverflowError for one that is not a u32.

    Args:
        tokens: the token ids.
        kv_block_size: tokens a block.
        block_mm_infos: the media of each block, in order. Hashes of media count, their order does not.
        lora_name: the adapter that reads the tokens; "" is none.
        is_eagle: blocks are of an Eagle drafter: each has the first token of the next one, too.
        cache_namespace: keeps requests apart that must not share blocks; "" is none.
    """
    if kv_block_size < 1:
        raise ValueError(f"kv_block_size={kv_block_size} must be at least 1")
    seed = lora_seed(lora_name) if lora_name else SEED
    if cache_namespace:
        seed = salted_seed(cache_namespace, seed)
    media = [_media_hashes(info) for info in block_mm_infos or ()]
    if not any(media) and not is_eagle:
        return local_hashes(tokens, kv_block_size, seed=seed)
    ids, length = array("I", tokens), kv_block_size + bool(is_eagle)
    starts = range(0, len(ids) - length + 1, kv_block_size)
    media += [b""] * (len(starts) - len(media))
    return [
        xxh3_64_intdigest(pack_tokens(ids[start : start + length]) + own, seed)
        for start, own in zip(starts, media, strict=False)
    ]


def _media_hashes(info: MmInfo) -> bytes:
    """Return the packed hashes of a block's media, in order of size. Raises ValueError."""
    if info is None:
        return b""
    try:
        return pack_names(sorted(media["mm_hash"] for media in info["mm_objects"]))
    except (KeyError, TypeError, OverflowError) as exc:
        raise ValueError(
            f"block_mm_infos: {info!r} must be None or {{'mm_objects': [{{'mm_hash': a u64}}, …]}}"
        ) from exc
