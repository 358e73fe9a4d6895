"""A short run of the soak: each fault once, in a random order, on top of each other."""

from __future__ import annotations

import pytest

from dynamo_redis.store.server import EmbeddedServer
from tests.kv_soak import soak


@pytest.mark.parametrize("seed", [1])
async def test_indexes_equal_caches_after_every_fault(
    own_redis_server: EmbeddedServer, dynamo_redis_prefix: str, seed: int
) -> None:
    done = await soak(own_redis_server, dynamo_redis_prefix, seed=seed, duration_s=0.0)
    assert len(done) == 14
