"""The connections that a deployment's processes have open to Redis."""

from __future__ import annotations

from typing import Final

CONNECTIONS: Final = {"workers": 5, "frontends": 9, "routers": 8}
"""Connections of one process at rest with routing by KV caches, counted on a running deployment. More are
open while many commands are under way."""

MARGIN: Final = 1.25
"""For processes that are replaced, and for commands of people."""


def connections_needed(need: dict[str, int]) -> int:
    """Return the connections of so many workers, frontends and routers, with a margin."""
    return round(MARGIN * sum(CONNECTIONS[kind] * count for kind, count in need.items()))
