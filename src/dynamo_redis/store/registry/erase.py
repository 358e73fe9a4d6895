"""Removes a whole registry, with its objects and events: for tests that share a server."""

from __future__ import annotations

import re

from dynamo_redis.store.redis.opening import open_client

_GLOB = re.compile(r"([*?\[\]\\^])")
_KEYS_A_CALL = 500


async def erase_prefix(url: str, prefix: str, *, timeout_s: float = 3.0) -> int:
    """Delete every key of the registry `prefix`; return their number. Raises StoreError.

    No process may use the registry any more: a key that is written meanwhile may stay.
    """
    client = open_client(url, timeout_s=timeout_s)
    erased = 0
    try:
        for tag in (f"{{{prefix}}}", f"{{{prefix}/"):  # the registry's own tag, and those below it
            keys = [key async for key in client.scan(_GLOB.sub(r"\\\1", tag) + "*")]
            for start in range(0, len(keys), _KEYS_A_CALL):
                # A command a key: on a cluster the keys are in many slots.
                part = keys[start : start + _KEYS_A_CALL]
                erased += sum(await client.pipeline([("UNLINK", key) for key in part]))
    finally:
        await client.aclose()
    return erased
