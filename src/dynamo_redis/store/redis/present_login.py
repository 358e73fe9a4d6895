"""The origin and the end of the password that a client of a URL uses, for people."""

from __future__ import annotations

from dynamo_redis.config import RedisLogin
from dynamo_redis.store.redis.credential_origins import end_of_token
from dynamo_redis.store.redis.url import parse_server_url


def present_login(url: str, login: RedisLogin | None) -> tuple[str, float | None]:
    """Return the setting that the password is from, "" without a password, and the password's end in seconds
    since 1970, if it is known. Raises ConfigError."""
    parsed = parse_server_url(url, login)
    source = parsed.credentials()
    if source is not None:
        known = source.known
        source.release()
        return source.name, None if known is None else known.expires_at
    password = parsed.options().get("password")
    if not password:
        return "", None
    return (login or RedisLogin()).origin, end_of_token(str(password))
