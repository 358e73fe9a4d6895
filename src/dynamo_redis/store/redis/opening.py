"""Makes the client that a URL asks for."""

from __future__ import annotations

from dynamo_redis.config import RedisLogin
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.redis.url import parse_server_url


def open_client(
    url: str, *, timeout_s: float, client_name: str = "dynamo-redis", login: RedisLogin | None = None
) -> StoreClient:
    """Return a client, not yet connected; its owner closes it. `login`: user and password that do not
    stand in the URL. Raises ConfigError for a URL that cannot be used."""
    if not parse_server_url(url, login).nodes:
        return RedisClient(url, timeout_s=timeout_s, client_name=client_name, login=login)
    from dynamo_redis.store.redis.cluster.client import ClusterClient

    return ClusterClient(url, timeout_s=timeout_s, client_name=client_name, login=login)
