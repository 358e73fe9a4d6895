"""The report of a row from its rounds."""

from __future__ import annotations

from benchmarks.harness.report import Measured, Row


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    measured = Measured.against([100, 1, 30], [50, 1, 10])
    assert measured == Measured(ours=30, rival=10, ratio=2, rounds=3)


def test_costs_of_the_rival_are_divided_by_ours() -> None:
    assert Measured.against([1, 2, 4], [4, 8, 16], costs=True) == Measured(2, 8, 4, 3)


def test_aim_below_the_must_means_lower_is_better() -> None:
    def verdict(ours: float) -> str:
        return Row("P14", "", ours, None, None, 24, 10, 5).verdict

    assert [verdict(ours) for ours in (10, 24, 24.1)] == ["aim", "must", "missed"]


def test_equal_bounds_mean_lower_is_better() -> None:
    verdicts = [Row("S6", "", ours, None, None, 0, 0, 5).verdict for ours in (0.0, 1.0)]
    assert verdicts == ["aim", "missed"]


def test_ratio_is_held_against_the_bounds_if_there_is_one() -> None:
    assert Row("P1", "", 5, 1, 0.5, 0.45, 0.65, 5).verdict == "must"


def test_equal_bounds_above_zero_are_to_be_reached() -> None:
    verdicts = [Row("F12", "", ours, None, None, 100, 100, 5).verdict for ours in (100.0, 99.9)]
    assert verdicts == ["aim", "missed"]
