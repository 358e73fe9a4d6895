"""The data-parallel rank of a request: the names of `dynamo.common.backend.dp_rank`. Pure."""

from __future__ import annotations

import logging

from dynamo_redis.common.backend.engine import GenerateRequest

log = logging.getLogger(__name__)


def forced_dp_rank(request: GenerateRequest) -> int | None:
    """Return the rank that a router chose, or None."""
    rank = (request.get("routing") or {}).get("dp_rank")
    return None if rank is None else int(rank)


def validate_global_dp_rank(
    dp_rank: int | None, dp_start: int, dp_size: int, backend_label: str
) -> int | None:
    """Return the rank if it is one of several that the worker has; None, for the engine's own choice, if
    not. A rank of another worker is named in the log."""
    if dp_rank is None or dp_size <= 1:
        return None
    if not dp_start <= dp_rank < dp_start + dp_size:
        log.warning(
            "data-parallel rank %d is not in [%d, %d): %s chooses one",
            dp_rank,
            dp_start,
            dp_start + dp_size,
            backend_label,
        )
        return None
    return dp_rank
