"""The reading of PromQL, on which the test of dashboard and alerts depends."""

from __future__ import annotations

import pytest

from tests.promql import names_in


@pytest.mark.parametrize(
    ("expression", "metrics", "labels"),
    [
        ("up == 0", {"up"}, set()),
        ('a{b="c", d=~"e|f"} / g', {"a", "g"}, {"b", "d"}),
        ("sum by (x, y) (rate(a_total[$__rate_interval])) > 0.05", {"a_total"}, {"x", "y"}),
        ("histogram_quantile(0.99, sum by (le) (rate(a_bucket[5m])))", {"a_bucket"}, {"le"}),
        ("sum(rate(a[5m])) by (x)", {"a"}, {"x"}),
        ("a unless on (m) max by (m) (b) > 0", {"a", "b"}, {"m"}),
        ("count(a == 0) or vector(0)", {"a"}, set()),
        ('a{t="q{w=\\"e\\"}"} offset 5m', {"a"}, {"t"}),
    ],
)
def test_names_are_found(expression: str, metrics: set[str], labels: set[str]) -> None:
    found = names_in(expression)
    assert (found.metrics, found.labels) == (metrics, labels)
