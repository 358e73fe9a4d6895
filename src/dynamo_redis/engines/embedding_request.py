"""A request for embeddings, as an engine reads it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dynamo_redis.errors import InvalidRequest

BATCH_COUNT: Final = 64
"""Most inputs whose vectors are one item of an answer: so items stay small beside the largest message."""


def input_ids(request: object) -> list[list[int]]:
    """Return the token ids of each input. Raises InvalidRequest."""
    token_ids = request.get("token_ids") if isinstance(request, Mapping) else None
    if (
        not isinstance(token_ids, list)
        or not token_ids
        or not all(isinstance(ids, list) and set(map(type, ids)) == {int} for ids in token_ids)
    ):
        raise InvalidRequest(
            "token_ids must be a non-empty list of inputs, each a non-empty list of token ids: this worker "
            "makes embeddings only"
        )
    return token_ids


def wanted_dimensions(request: Mapping[str, Any]) -> int | None:
    """Return the length of the vectors that the client wants; None: the model's own. Raises
    InvalidRequest."""
    dimensions = request.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise InvalidRequest("dimensions must be an integer from 1 on")
    return dimensions


def wants_base64(request: Mapping[str, Any]) -> bool:
    """Return whether the client wants vectors as base64."""
    return request.get("encoding_format") == "base64"
