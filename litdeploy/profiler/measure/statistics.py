"""Statistics of the samples: medians, quartiles, tail percentiles, and the ratio of two sides with its verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri, stdtrit

from litdeploy.profiler.schema import Comparison, Summary, Verdict

# The fewest samples to report a percentile from: then several are beyond it, and not a single outlier.
_SAMPLES_FOR: dict[float, int] = {90: 64, 95: 130, 99: 662, 99.9: 6_636}
# With fewer than six samples, even the smallest and the largest contain the median less than 95 times in 100.
_SAMPLES_FOR_INTERVAL = 6
_BLOCKS_FOR_INTERVAL = 4
_CALLS_A_SIDE_AND_BLOCK = 2

# The verdict is "faster" if the whole interval is beyond the first, and "same" if all of it is within the second. Two
# copies of one program may differ by a percent as long as they run, since their memory is at other addresses.
_LEAST_DIFFERENCE = 1.02
_SAME_WITHIN = 1.05

# If the speed-up in wall time differs from that in processor time by this factor, other load caused it.
_FAR_FROM_CPU = 1.25

_RESAMPLES = 2_000
_CONFIDENCE = 0.95


def summarize(milliseconds: Sequence[float], batch_size: int) -> Summary:
    """Summarize the times of one side.

    Args:
        milliseconds: one per call, in the order of the calls; at least one.
        batch_size: images per call.
    """
    q1, middle, q3 = (float(value) for value in np.percentile(milliseconds, (25, 50, 75)))
    low, high = median_interval(milliseconds) or (None, None)
    return Summary(
        samples=len(milliseconds),
        median_ms=middle,
        median_low_ms=low,
        median_high_ms=high,
        q1_ms=q1,
        q3_ms=q3,
        p90_ms=percentile(milliseconds, 90),
        p95_ms=percentile(milliseconds, 95),
        p99_ms=percentile(milliseconds, 99),
        p99_9_ms=percentile(milliseconds, 99.9),
        images_per_second=1e3 * batch_size / middle,
    )


def percentile(milliseconds: Sequence[float], percent: float) -> float | None:
    """A percentile of the tail (90, 95, 99 or 99.9); None if there are too few samples for it."""
    if len(milliseconds) < _SAMPLES_FOR[percent]:
        return None
    return float(np.percentile(milliseconds, percent))


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the median of autocorrelated samples; None from fewer than 6.

    Its ends are quantiles of the samples. Their distance from the middle follows from the long-run variance of "this
    sample is below the median", by the equally weighted cosine estimator with Student's t (Lazarus, Lewis, Stock and
    Watson, HAR Inference: Recommendations for Practice, J. Bus. Econ. Stat. 2018, section 3).
    """
    if len(samples) < _SAMPLES_FOR_INTERVAL:
        return None
    values = np.asarray(samples, dtype=float)
    median = np.median(values)
    below = (values < median) + 0.5 * (values == median)
    deviation, terms = _long_run_deviation(below)
    reach = float(stdtrit(terms, (1 + _CONFIDENCE) / 2)) * deviation / math.sqrt(len(values))
    low, high = np.quantile(values, np.clip((0.5 - reach, 0.5 + reach), 0, 1))
    return float(low), float(high)


def _long_run_deviation(values: np.ndarray) -> tuple[float, int]:
    """Square root of the long-run variance, and the degrees of freedom of its estimate."""
    count = len(values)
    terms = max(1, int(0.41 * count ** (2 / 3)))
    waves = np.cos(np.pi * np.outer(np.arange(1, terms + 1), np.arange(count) + 0.5) / count)
    projected = math.sqrt(2 / count) * waves @ (values - values.mean())
    return float(np.sqrt(np.mean(projected**2))), terms


def compare_sides(
    teacher: Sequence[float],
    student: Sequence[float],
    teacher_cpu: Sequence[float] = (),
    student_cpu: Sequence[float] = (),
    contended: bool = False,
) -> Comparison:
    """Compare two sides that were timed in blocks of two calls each.

    Args:
        teacher, student: milliseconds in the order of measurement; equally many, an even number.
        teacher_cpu, student_cpu: the processor time of each call; empty if unknown.
        contended: whether calls waited for a core; see `Conditions.contended`.
    """
    a, b = (np.asarray(side, dtype=float).reshape(-1, _CALLS_A_SIDE_AND_BLOCK) for side in (teacher, student))
    low, high = ratio_interval(a, b) or (None, None)
    speedup = float(np.median(a) / np.median(b))
    cpu_speedup = None
    if len(teacher_cpu) and len(student_cpu) and (had := float(np.median(student_cpu))) > 0:
        cpu_speedup = float(np.median(teacher_cpu)) / had
    verdict, reason = judge(speedup, low, high, a.size, cpu_speedup if contended else None)
    return Comparison(
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        paired_speedup=float(np.median(a.sum(axis=1) / b.sum(axis=1))),
        cpu_speedup=cpu_speedup,
        verdict=verdict,
        reason=reason,
    )


def ratio_interval(teacher: np.ndarray, student: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the ratio of medians, by block bootstrap; None from fewer than 4 blocks.

    It resamples how much each block of calls moves the logarithm of the ratio (the influence function of a median:
    which side of it a sample is on, over the density there). Resampling the times themselves gives too wide intervals
    on a machine that drifts: both medians wander through the drift, each by other samples.

    Args:
        teacher, student: (blocks, 2) milliseconds.
    """
    blocks = len(teacher)
    if blocks < _BLOCKS_FOR_INTERVAL:
        return None
    influence = _influence(np.log(teacher)) - _influence(np.log(student))
    length = _bootstrap_length(influence)
    chunks = -(-blocks // length)
    # Circular, so that each block is drawn equally often: Politis and Romano, 1992.
    sums = np.concatenate(([0.0], np.cumsum(np.concatenate((influence, influence)))))
    starts = np.random.default_rng(0).integers(blocks, size=(_RESAMPLES, chunks))
    drawn = (sums[starts + length] - sums[starts]).sum(axis=1) / (chunks * length)
    low, high = np.quantile(drawn, ((1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2))
    # The variance of few chunks is biased low, and Student's t accounts for its own uncertainty. Overlapping chunks are
    # worth 1.5 times as many (Meketon and Schmeiser, Overlapping Batch Means, 1984).
    independent = max(1.5, blocks / length)
    quantile = (1 + _CONFIDENCE) / 2
    widening = float(stdtrit(max(1.0, 1.5 * (independent - 1)), quantile) / ndtri(quantile))
    widening *= math.sqrt(independent / (independent - 1))
    middle = math.log(np.median(teacher) / np.median(student))
    return math.exp(middle + widening * low), math.exp(middle + widening * high)


def _influence(log_times: np.ndarray) -> np.ndarray:
    """How much each block moves the median of all samples; their mean is about 0.

    The density at the median is estimated from the quantiles around it (Siddiqui, 1960; bandwidth of Hall and
    Sheather, 1988).

    Args:
        log_times: (blocks, 2).
    """
    values = log_times.ravel()
    z = float(ndtri((1 + _CONFIDENCE) / 2))
    bandwidth = min(0.49, len(values) ** (-1 / 3) * z ** (2 / 3) * (0.75 / math.pi) ** (1 / 3))
    low, median, high = np.quantile(values, (0.5 - bandwidth, 0.5, 0.5 + bandwidth))
    below = (log_times < median) + 0.5 * (log_times == median)
    influence: np.ndarray = (0.5 - below).mean(axis=1) * (high - low) / (2 * bandwidth)
    influence -= influence.mean()
    return influence


def _bootstrap_length(values: np.ndarray) -> int:
    """How many blocks to resample together, from their autocorrelation (Andrews, 1991, by AR(1))."""
    count = len(values)
    square = float(values @ values)
    correlation = min(0.97, max(0.0, float(values[1:] @ values[:-1]) / square)) if square else 0.0
    alpha: float = 4 * correlation**2 / ((1 - correlation) * (1 + correlation)) ** 2
    longest = max(1, count // 5)
    return min(longest, max(round(2 * math.cbrt(count)), round(1.1447 * math.cbrt(alpha * count))))


def across_processes(
    found: Sequence[tuple[float, float | None, float | None]],
) -> tuple[float, float | None, float | None]:
    """Geometric mean of the values of several processes, and its 95 % interval; None if one of them has no interval.

    The interval follows from the spread between the processes (Student's t), and is no narrower than their own allow.

    Args:
        found: (value, low, high) of each process, all positive.
    """
    logs = np.log([value for value, _, _ in found])
    middle, count = float(logs.mean()), len(found)
    reaches = [math.log(high / low) / 2 for _, low, high in found if low is not None and high is not None]
    if len(reaches) < count:
        return math.exp(middle), None, None
    within = math.sqrt(sum(reach**2 for reach in reaches)) / count
    between = 0.0
    if count > 1:
        between = mean_reach(logs)
    reach = max(within, between)
    return math.exp(middle), math.exp(middle - reach), math.exp(middle + reach)


def mean_reach(values: Sequence[float] | np.ndarray) -> float:
    """Half-width of the mean's 95 % interval, by Student's t; a bootstrap of few values is too narrow.

    Args:
        values: independent; at least two.
    """
    t = float(stdtrit(len(values) - 1, (1 + _CONFIDENCE) / 2))
    return t * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def judge(
    speedup: float, low: float | None, high: float | None, samples: int, cpu_speedup: float | None = None
) -> tuple[Verdict, str | None]:
    """Verdict on a speed-up and its interval, and the reason if it is `unclear`.

    Args:
        samples: number of samples per side; without an interval they are too few.
        cpu_speedup: the speed-up in processor time, if calls waited for a core.
    """
    if low is None or high is None:
        return "unclear", f"there are only {samples} samples a side"
    if cpu_speedup and not 1 / _FAR_FROM_CPU <= speedup / cpu_speedup <= _FAR_FROM_CPU:
        return "unclear", (
            f"in processor time it is {cpu_speedup:.2f}×: calls waited for the core, which other work had; measure "
            "again on a quieter machine"
        )
    if low >= _LEAST_DIFFERENCE:
        return "faster", None
    if high <= 1 / _LEAST_DIFFERENCE:
        return "slower", None
    if low >= 1 / _SAME_WITHIN and high <= _SAME_WITHIN:
        return "same", None
    return "unclear", f"with 95 % confidence it is only known to be between {low:.2f}× and {high:.2f}×"


def contradicted(comparison: Comparison) -> bool:
    """Whether its interval alone would give a verdict, and its processor time contradicts that."""
    alone, _ = judge(comparison.speedup, comparison.speedup_low, comparison.speedup_high, 0)
    return comparison.verdict == "unclear" != alone
