from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.signal import lfilter

from litdeploy.profiler.measure.statistics import (
    across_processes,
    compare_sides,
    judge,
    median_interval,
    percentile,
    ratio_interval,
    summarize,
)

SIMULATIONS = 1_000


def autoregressive(random: np.random.Generator, count: int, correlation: float) -> np.ndarray:
    """Normal, of variance 1, each correlated with the one before."""
    steps = random.standard_normal(count + 200) * np.sqrt(1 - correlation**2)
    return lfilter([1], [1, -correlation], steps)[200:]


def sides(
    random: np.random.Generator, blocks: int, *, correlation: float, shared: float, drift: float = 0, spikes: float = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Two sides, (blocks, 2), that take as long, timed in blocks TSST or STTS on a machine that all calls share."""
    count = 4 * blocks
    machine = shared * autoregressive(random, count, correlation) + drift * np.arange(count) / count
    times = np.exp(machine + 0.02 * random.gumbel(size=count)) * np.where(random.random(count) < spikes, 2.5, 1)
    first = np.array([[True, False, False, True], [False, True, True, False]])[random.integers(2, size=blocks)].ravel()
    return times[first].reshape(-1, 2), times[~first].reshape(-1, 2)


MACHINES = {
    "quiet": {"correlation": 0.0, "shared": 0.0},
    "wandering": {"correlation": 0.9, "shared": 0.05},
    "drifting": {"correlation": 0.9, "shared": 0.02, "drift": 0.2},
    "interrupted": {"correlation": 0.9, "shared": 0.05, "spikes": 0.05},
}


def test_summary_of_known_numbers() -> None:
    summary = summarize([5.0, 1.0, 3.0, 2.0, 4.0], batch_size=6)
    assert (summary.samples, summary.median_ms, summary.q1_ms, summary.q3_ms) == (5, 3.0, 2.0, 4.0)
    assert summary.images_per_second == 2000
    assert summary.p90_ms is summary.p95_ms is summary.p99_ms is summary.p99_9_ms is None
    assert summary.median_low_ms is summary.median_high_ms is None


def test_an_interval_needs_six_samples() -> None:
    assert median_interval([1, 2, 3, 4, 5]) is None
    assert median_interval([1, 2, 3, 4, 5, 6]) is not None
    assert median_interval([2.0] * 50) == (2, 2)
    assert ratio_interval(np.ones((3, 2)), np.ones((3, 2))) is None


@pytest.mark.parametrize(("count", "correlation"), [(64, 0.0), (64, 0.5), (200, 0.0), (200, 0.5), (660, 0.6)])
def test_the_medians_interval_holds_the_median_95_times_in_100(count: int, correlation: float) -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(SIMULATIONS):
        interval = median_interval(np.exp(0.1 * autoregressive(random, count, correlation)))
        assert interval is not None
        held += interval[0] <= 1 <= interval[1]
    assert 0.93 <= held / SIMULATIONS <= 0.97


@pytest.mark.parametrize("machine", MACHINES)
def test_the_ratios_interval_holds_the_ratio_95_times_in_100(machine: str) -> None:
    """Over 1,000 simulations each it holds it 94 to 97 times in 100; over 300 that is known to two more."""
    random, held = np.random.default_rng(0), 0
    for _ in range(300):
        teacher, student = sides(random, 100, **MACHINES[machine])
        interval = ratio_interval(1.5 * teacher, student)
        assert interval is not None
        held += interval[0] <= 1.5 <= interval[1]
    assert 0.92 <= held / 300 <= 0.985


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, "same"), (1.05, "faster"), (1 / 1.05, "slower")])
def test_verdicts_are_right_95_times_in_100(machine: str, ratio: float, verdict: str) -> None:
    random = np.random.default_rng(0)
    found = Counter(
        compare_sides((ratio * teacher).ravel(), student.ravel()).verdict
        for teacher, student in (sides(random, 200, **MACHINES[machine]) for _ in range(60))
    )
    assert found[verdict] >= 57


def test_several_processes_are_told_by_their_spread() -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(SIMULATIONS):
        logs = random.normal(np.log(2), 0.01, size=3)
        _, low, high = across_processes([(value, value / 1.001, value * 1.001) for value in np.exp(logs)])
        assert low is not None
        assert high is not None
        held += low <= 2 <= high
    assert 0.93 <= held / SIMULATIONS <= 0.97


def test_processes_that_agree_by_chance_are_known_no_better_than_each_is() -> None:
    value, low, high = across_processes([(2.0, 2 / 1.1, 2 * 1.1)] * 4)
    assert value == pytest.approx(2)
    assert low == pytest.approx(2 / 1.1 ** (1 / 2))
    assert high == pytest.approx(2 * 1.1 ** (1 / 2))
    assert across_processes([(2.0, None, None), (2.0, 1.0, 3.0)]) == (pytest.approx(2), None, None)


@pytest.mark.parametrize(("percent", "needed"), [(90, 64), (95, 130), (99, 662), (99.9, 6_636)])
def test_a_percentile_needs_enough_samples(percent: float, needed: int) -> None:
    assert percentile(range(needed - 1), percent) is None
    assert percentile(range(needed), percent) == pytest.approx((needed - 1) * percent / 100)


def test_the_speedup_is_the_ratio_of_the_medians_and_the_pairs_are_told_beside_it() -> None:
    # The machine slows down by half way: within every block the ratio is 2, whatever the medians do.
    student = [1.0] * 4 + [3.0] * 6
    comparison = compare_sides([2 * value for value in student], student)
    assert comparison.speedup == pytest.approx(2)
    assert comparison.paired_speedup == pytest.approx(2)
    drifting = compare_sides([2.0, 2.0, 2.0, 2.0, 4.0, 4.0], [1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
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
    comparison = compare_sides(teacher, student)
    assert (comparison.verdict, comparison.reason) == (verdict, reason)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.02, 1.9, "faster"),
        (1.019, 1.9, "unclear"),
        (0.5, 0.98, "slower"),
        (0.96, 1.04, "same"),
        (1.01, 1.05, "same"),
        (0.94, 1.01, "unclear"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, verdict: str) -> None:
    found, reason = judge((low * high) ** 0.5, low, high, samples=100)
    assert found == verdict
    assert (reason is None) == (verdict != "unclear")


def test_calls_that_waited_for_the_core_are_not_compared() -> None:
    """On a busy machine the long calls lose the core and the short ones do not: the ratio is the scheduler's."""
    times = [10.0] * 64, [1.0] * 64, [2.0] * 64, [1.0] * 64
    assert compare_sides(*times).verdict == "faster"
    comparison = compare_sides(*times, contended=True)
    assert comparison.speedup == pytest.approx(10)
    assert comparison.cpu_speedup == pytest.approx(2)
    assert comparison.verdict == "unclear"
    assert "in processor time it is 2.00×" in str(comparison.reason)
