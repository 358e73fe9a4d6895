"""Reads from expressions of PromQL the metrics and labels that they name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

_TOKEN: Final = re.compile(
    r"""(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<range>\[[^\]]*\])
    | (?P<number>\d[\w.]*)
    | (?P<name>[a-zA-Z_:][\w:]*)
    | (?P<sign>[{}(),]|[^\s\w])""",
    re.VERBOSE,
)
_GROUPING: Final = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_CALLED: Final = {"(", "by", "without"}
"""The tokens behind the name of a function or an aggregation."""
_OPERATORS: Final = {"and", "or", "unless", "bool", "offset", "inf", "nan", "atan2"}

TARGET_LABELS: Final = frozenset({"job", "instance"})
"""Labels that Prometheus adds to each sample."""

OWN_METRICS: Final = frozenset({"up"})
"""Metrics that Prometheus makes of each target."""


@dataclass
class Names:
    """The names in an expression."""

    metrics: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)


def names_in(expression: str) -> Names:
    """Return the metrics of an expression, and the labels that it selects or groups by."""
    found = Names()
    tokens = [(match.lastgroup, match[0]) for match in _TOKEN.finditer(expression)]
    within_labels = False
    for place, (kind, text) in enumerate(tokens):
        following = tokens[place + 1][1] if place + 1 < len(tokens) else ""
        if kind == "sign":
            opens_labels = text == "{" or (text == "(" and place and tokens[place - 1][1] in _GROUPING)
            within_labels = bool(opens_labels) or (within_labels and text not in "})")
        elif kind == "name" and within_labels:
            found.labels.add(text)
        elif kind == "name" and text not in _GROUPING | _OPERATORS and following not in _CALLED:
            found.metrics.add(text)
    return found
