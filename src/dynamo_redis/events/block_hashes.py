"""Names of KV blocks, by which routers match prompts with the blocks that engines report. Pure.

Tokens are cut into blocks of `block_size`; a partial tail has no name. A *local* hash names a block's own
tokens; a *sequence* hash names a block together with everything before it, so that equal sequence hashes
mean equal prefixes. Both are xxh3_64, as Dynamo computes them:

    b_i = xxh3_64(tokens of block i as LE u32, seed)
    s_0 = b_0,   s_i = xxh3_64(LE u64 s_{i-1} ‖ LE u64 b_i, seed)

with seed 1337, or `1337 + xxh3_64(name, 0)` for tokens that a LoRA adapter `name` reads. A salt, which keeps
requests apart that must not share blocks, adds `xxh3_64(salt, 1)` to the seed, and the digest of a prompt's
images `xxh3_64(digest, 2)`.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from itertools import repeat
from struct import Struct

from xxhash import xxh3_64_intdigest

SEED = 1337

_U64_PAIR = Struct("<QQ")
_U64_MASK = (1 << 64) - 1


def lora_seed(name: str) -> int:
    """Return the seed for blocks read by a LoRA adapter."""
    return (SEED + xxh3_64_intdigest(name.encode(), 0)) & _U64_MASK


def salted_seed(cache_salt: str, seed: int = SEED) -> int:
    """Return the seed for blocks that only requests with this salt may share."""
    return (seed + xxh3_64_intdigest(cache_salt.encode(), 1)) & _U64_MASK


def media_seed(digest: str, seed: int = SEED) -> int:
    """Return the seed for blocks of prompts with images of this digest. No salt makes the same seed."""
    return (seed + xxh3_64_intdigest(digest.encode(), 2)) & _U64_MASK


def local_hashes(token_ids: Iterable[int], block_size: int, *, seed: int = SEED) -> list[int]:
    """Return the local hash of each whole block. Fastest on an `array('I')`.

    Raises TypeError if it is not a sequence of integers, OverflowError if an integer is not a u32.
    """
    tokens = (
        token_ids if isinstance(token_ids, array) and token_ids.typecode == "I" else array("I", token_ids)
    )
    count = len(tokens) // block_size
    whole = pack_tokens(tokens)[: count * block_size * 4]
    blocks = Struct(f"{block_size * 4}s" * count).unpack(whole)
    return list(map(xxh3_64_intdigest, blocks, repeat(seed)))


def pack_tokens(token_ids: array[int]) -> bytes:
    """Pack the tokens of an `array('I')` as four bytes each, little-endian."""
    if sys.byteorder == "big":
        token_ids = array("I", token_ids)
        token_ids.byteswap()
    return token_ids.tobytes()


def chain(local: Iterable[int], parent: int | None = None, *, seed: int = SEED) -> list[int]:
    """Return the sequence hashes of blocks that follow `parent` (None: they begin the sequence)."""
    hashes: list[int] = []
    pack = _U64_PAIR.pack
    for block in local:
        parent = block if parent is None else xxh3_64_intdigest(pack(parent, block), seed)
        hashes.append(parent)
    return hashes


def pack_names(hashes: Iterable[int]) -> bytes:
    """Pack sequence hashes as eight bytes each, little-endian. Raises OverflowError if one is no u64."""
    names = array("Q", hashes)
    if sys.byteorder == "big":
        names.byteswap()
    return names.tobytes()
