from __future__ import annotations

from typing import Literal

import pytest

from litdeploy.profiler.statistics import compare, percentile, summarise


def test_summary_of_known_numbers() -> None:
    summary = summarise([5.0, 1.0, 3.0, 2.0, 4.0], batch_size=6)
    assert (summary.samples, summary.median_ms, summary.q1_ms, summary.q3_ms) == (5, 3.0, 2.0, 4.0)
    assert summary.images_per_second == 2000
    assert summary.p90_ms is summary.p95_ms is summary.p99_ms is None


@pytest.mark.parametrize(("percent", "needed"), [(90, 64), (95, 130), (99, 662)])
def test_a_percentile_needs_enough_samples(percent: Literal[90, 95, 99], needed: int) -> None:
    assert percentile(range(needed - 1), percent) is None
    assert percentile(range(needed), percent) == pytest.approx((needed - 1) * percent / 100)


def test_the_speedup_is_the_ratio_of_the_medians_and_the_pairs_are_told_beside_it() -> None:
    # The machine slows down by half way: within every block the ratio is 2, whatever the medians do.
    student = [1.0] * 4 + [3.0] * 6
    comparison = compare([2 * value for value in student], student)
    assert comparison.speedup == pytest.approx(2)
    assert comparison.paired_speedup == pytest.approx(2)
    drifting = compare([2.0, 2.0, 2.0, 2.0, 4.0, 4.0], [1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    assert drifting.speedup == pytest.approx(1)
    assert drifting.paired_speedup == pytest.approx(2)


@pytest.mark.parametrize(
    ("teacher", "student", "verdict", "reason"),
    [
        ([2.0] * 8, [1.0] * 8, "faster", None),
        ([1.0] * 8, [2.0] * 8, "slower", None),
        ([1.01] * 8, [1.0] * 8, "same", None),
        ([1.0] * 8, [1.01] * 8, "same", None),
        ([1.03] * 8, [1.0] * 8, "faster", None),
        ([2.0] * 6, [1.0] * 6, "unclear", "there are only 6 samples a side"),
    ],
)
def test_verdict(teacher: list[float], student: list[float], verdict: str, reason: str | None) -> None:
    comparison = compare(teacher, student)
    assert (comparison.verdict, comparison.reason) == (verdict, reason)
