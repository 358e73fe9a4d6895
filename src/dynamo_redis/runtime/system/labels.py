"""The labels that an endpoint's metrics get from its `metrics_labels`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

Labels = Sequence[tuple[str, str]]

_OWN: Final = frozenset(
    {"dynamo_namespace", "dynamo_component", "dynamo_endpoint", "worker_id", "error_type", "le"}
)
_NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def check_labels(labels: Iterable[tuple[str, str]] | None) -> Labels:
    """Return the labels as texts.

    Raises ValueError for a name that Prometheus does not allow, or that the metrics have already.
    """
    checked = [(str(name), str(value)) for name, value in labels or ()]
    names = [name for name, _ in checked]
    for name in names:
        if not _NAME.fullmatch(name) or name.startswith("__"):
            raise ValueError(f"metrics_labels: {name!r} is not a label name of Prometheus")
        if name in _OWN or names.count(name) > 1:
            raise ValueError(f"metrics_labels: the label {name!r} is there already")
    return checked
