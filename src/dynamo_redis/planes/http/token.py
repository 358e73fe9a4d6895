"""Bearer tokens: who can read an instance's record can make one. Pure.

    v1.<instance id, hex>.<expiry, seconds since 1970>.<HMAC-SHA256 of the parts before, hex>

The key is the instance's secret. A token is valid for one instance until it expires.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Final

from dynamo_redis.errors import AuthenticationFailed
from dynamo_redis.names import format_instance_id

TOKEN_S: Final = 3600.0
"""Default lifetime of a token that a person asks for."""

_VERSION: Final = "v1"
_HEAD: Final = re.compile(rf"{_VERSION}\.([0-9a-f]+)\.([0-9]{{1,15}})")
_LABEL: Final = b"dynamo-redis http token\0"
_PROOF_LABEL: Final = b"dynamo-redis http instance\0"


def make_token(secret: bytes, instance_id: int, expires_at: float) -> str:
    """Return a token; `expires_at` is in seconds since 1970."""
    head = f"{_VERSION}.{format_instance_id(instance_id)}.{int(expires_at)}"
    return f"{head}.{_sign(secret, head)}"


def check_token(token: str, secret: bytes, instance_id: int, now: float) -> None:
    """Raise AuthenticationFailed for a token of another instance or secret, and for one that has expired."""
    head, _, signature = token.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _sign(secret, head).encode()):
        raise AuthenticationFailed("the token was not made with this instance's secret")
    found = _HEAD.fullmatch(head)
    if found is None:
        raise AuthenticationFailed(f"the token does not have the form {_VERSION}.INSTANCE.EXPIRY.SIGNATURE")
    if found[1] != format_instance_id(instance_id):
        raise AuthenticationFailed("the token is for another instance")
    if now >= int(found[2]):
        raise AuthenticationFailed("the token has expired: `dynamo-redis token` makes a new one")


def make_proof(secret: bytes | None, instance_id: int, nonce: str) -> str:
    """Return the proof by which an instance shows that it knows its secret; empty without a secret."""
    if secret is None:
        return ""
    head = f"{format_instance_id(instance_id)}.{nonce}".encode()
    return hmac.new(secret, _PROOF_LABEL + head, hashlib.sha256).hexdigest()


def _sign(secret: bytes, head: str) -> str:
    return hmac.new(secret, _LABEL + head.encode(), hashlib.sha256).hexdigest()
