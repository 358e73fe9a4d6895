"""Names that workers, routers and frontends agree on: topics of event streams, and endpoints of a worker.

A topic names an event stream of a component. Each endpoint here stands beside the one that generates, in
the same component and on the same instances.
"""

from __future__ import annotations

from typing import Final

# Topics.

KV_EVENTS: Final = "kv_events"
"""The blocks that enter and leave a worker's KV cache (`wire/kv_event.py`): from workers to routers."""

KV_METRICS: Final = "kv_metrics"
"""How full a rank's KV cache and batch are: from workers to routers."""

FORWARD_PASS_METRICS: Final = "forward_pass_metrics"  # noqa: S105 - no password
"""The work of a rank's last forward pass: from workers, for planners and other observers."""

ACTIVE_SEQUENCES: Final = "active_sequences_events"
"""The requests that a router has sent to workers: from each router to the other routers of the component."""

# Endpoints.

KV_DUMP: Final = "kv_dump"
"""Answers a router with the KV events that it has missed, or with all blocks (`events/kv_dump.py`)."""

LOAD_METRICS: Final = "load_metrics"
"""Answers with the present load, one item a rank."""

CLEAR_KV_BLOCKS: Final = "clear_kv_blocks"
"""Drops the KV blocks that no running request uses."""
