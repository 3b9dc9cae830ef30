"""What is said of the samples: medians, quartiles, tails where there are enough, and the ratio of two sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from litdeploy.bundle import Record

Verdict = Literal["faster", "slower", "no clear difference"]

# Fewest samples from which a percentile is told: with them, some lie beyond it, and not one freak alone.
_SAMPLES_FOR = {90: 64, 95: 130, 99: 662}
_CLEAR_SPEEDUP = 1.05
_SAMPLES_FOR_VERDICT = 8


class Summary(Record):
    """Times of one side, in milliseconds a call.

    Attributes:
        samples: how many calls were timed.
        median_ms: of all samples.
        q1_ms, q3_ms: the quartiles; between them lies the middle half of the samples.
        p90_ms, p95_ms, p99_ms: percentiles; None from fewer than 64, 130 or 662 samples.
        images_per_second: batch size over median.
    """

    samples: int
    median_ms: float
    q1_ms: float
    q3_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    images_per_second: float


class Comparison(Record):
    """Teacher against student.

    Attributes:
        speedup: median of the teacher over median of the student; above 1 the student is faster. The headline.
        paired_speedup: the same ratio within each block of calls that were made side by side, the median over the
            blocks. Where it is far from `speedup`, the machine did not hold still.
        verdict: `no clear difference` where there are fewer than 8 samples a side, where the middle halves of the
            samples overlap, or where the faster side is less than 1.05 times as fast.
        reason: which of these it was; None where there is a clear difference.
    """

    speedup: float
    paired_speedup: float
    verdict: Verdict
    reason: str | None


def summarise(milliseconds: Sequence[float], batch_size: int) -> Summary:
    """Summary of one side.

    Args:
        milliseconds: one a call, at least one.
        batch_size: images a call.
    """
    q1, middle, q3 = (float(value) for value in np.percentile(milliseconds, (25, 50, 75)))
    return Summary(
        samples=len(milliseconds),
        median_ms=middle,
        q1_ms=q1,
        q3_ms=q3,
        p90_ms=percentile(milliseconds, 90),
        p95_ms=percentile(milliseconds, 95),
        p99_ms=percentile(milliseconds, 99),
        images_per_second=1e3 * batch_size / middle,
    )


def percentile(milliseconds: Sequence[float], percent: Literal[90, 95, 99]) -> float | None:
    """A percentile of the tail; None where there are too few samples to tell it."""
    if len(milliseconds) < _SAMPLES_FOR[percent]:
        return None
    return float(np.percentile(milliseconds, percent))


def compare(teacher: Sequence[float], student: Sequence[float]) -> Comparison:
    """The ratio of two sides that were timed in blocks of two calls each.

    Args:
        teacher, student: milliseconds in the order in which they were measured; as many each, an even number.
    """
    a, b = np.asarray(teacher), np.asarray(student)
    speedup = float(np.median(a) / np.median(b))
    blocks_a, blocks_b = a.reshape(-1, 2).sum(axis=1), b.reshape(-1, 2).sum(axis=1)
    reason = _why_unclear(a, b, speedup)
    return Comparison(
        speedup=speedup,
        paired_speedup=float(np.median(blocks_a / blocks_b)),
        verdict="no clear difference" if reason else "faster" if speedup > 1 else "slower",
        reason=reason,
    )


def _why_unclear(teacher: np.ndarray, student: np.ndarray, speedup: float) -> str | None:
    """Why no difference can be told; None where one can."""
    if len(teacher) < _SAMPLES_FOR_VERDICT:
        return f"there are only {len(teacher)} samples a side"
    teacher_q1, teacher_q3 = np.percentile(teacher, (25, 75))
    student_q1, student_q3 = np.percentile(student, (25, 75))
    if teacher_q1 <= student_q3 and student_q1 <= teacher_q3:
        return "the middle halves of the samples overlap"
    if max(speedup, 1 / speedup) < _CLEAR_SPEEDUP:
        return "the medians are too close"
    return None
