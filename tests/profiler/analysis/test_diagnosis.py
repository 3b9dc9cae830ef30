from __future__ import annotations

from typing import Any

import pytest

from litdeploy.profiler.analysis.diagnosis import bounds, copy_bound, ideal_ratio, launch_bound
from litdeploy.profiler.machine.roofline import Rates, Work
from litdeploy.profiler.schema import Conditions, Measurement, SectionTime
from tests.profiler.conftest import measurement, side

TEACHER, STUDENT = side("ResNet-56", 56, 9, 0.8944), side("ResNet-20", 20, 3, 0.8906)
FLOP_RATIO = TEACHER.breakdown.flops / STUDENT.breakdown.flops


def with_student(made: Measurement, **fields: Any) -> Measurement:
    return made.model_copy(update={"student": made.student.model_copy(update=fields)})


def test_the_rest_of_the_ideal_ratio_is_what_did_not_shrink() -> None:
    # 1 ms in both, and 9 ms that shrink with the FLOPs.
    headline = measurement("onnxruntime", 1, 10.0, 1 + 9 / FLOP_RATIO)
    sections = [
        SectionTime(name="layer1", batch_size=1, teacher_ms=8.0, student_ms=3.0),
        SectionTime(name="stem and head", batch_size=1, teacher_ms=1.0, student_ms=1.0),
        SectionTime(name="layer1", batch_size=8, teacher_ms=80.0, student_ms=30.0),
    ]
    [finding] = ideal_ratio(TEACHER, STUDENT, headline, sections)
    assert finding.figures["flop_ratio"] == pytest.approx(FLOP_RATIO)
    assert finding.figures["fixed_ms"] == pytest.approx(headline.student.median_ms * finding.figures["fixed_share"])
    assert finding.figures["fixed_ms"] == pytest.approx(1.0, rel=0.01)
    assert finding.figures["stem_and_head_share"] == 0.25
    assert "The rest is as if" in finding.sentence
    assert "25% of the student's time in eager PyTorch" in finding.sentence


def test_more_than_the_ideal_leaves_no_rest() -> None:
    [finding] = ideal_ratio(TEACHER, STUDENT, measurement("eager", 1, 100.0, 1.0), [])
    assert "fixed_ms" not in finding.figures
    assert "The rest" not in finding.sentence


def test_where_calls_waited_for_the_core_the_ratio_is_that_of_processor_time() -> None:
    made = with_student(measurement("eager", 1, 100.0, 1.0), cpu_ms=1.0)
    contended = Conditions(seconds=2.0, waiting_seconds=1.0, cpu_seconds=1.0)
    teacher = made.teacher.model_copy(update={"cpu_ms": 2.0})
    made = made.model_copy(update={"teacher": teacher, "conditions": contended})
    [finding] = ideal_ratio(TEACHER, STUDENT, made, [])
    assert finding.figures["speedup"] == 2
    assert "2.0× as fast in processor time" in finding.sentence


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (Work(operations=0.8e9, bytes=1e6), "arithmetic-bound"),
        (Work(operations=0.1e9, bytes=8e6), "memory-bound"),
        (Work(operations=0.1e9, bytes=1e6), "overhead-bound"),
    ],
)
def test_bound_by_the_nearer_ceiling(work: Work, kind: str) -> None:
    """1 ms on a device of 1 TFLOP/s and 10 GB/s."""
    rates = Rates(operations=1e12, bytes=1e10)
    made = measurement("eager", 1, 2.0, 1.0)
    [finding] = bounds([made], lambda measurement: (work, rates))
    assert finding.kind == kind
    roof_ms = max(work.operations / 1e12, work.bytes / 1e10) * 1e3
    assert finding.figures["roof_ms"] == pytest.approx(roof_ms)
    assert finding.figures["share_of_roof"] == pytest.approx(roof_ms / made.student.median_ms)


def test_bounds_are_told_of_the_smallest_and_the_largest_batch() -> None:
    made = [measurement("eager", size, 2.0, 1.0) for size in (1, 8, 64)]
    found = list(bounds(made, lambda measurement: (Work(1e9, 1e6), Rates(1e12, 1e10))))
    assert [finding.batch_size for finding in found] == [1, 64]
    assert not list(bounds(made, lambda measurement: None))


def test_launch_bound_by_capture() -> None:
    bound = with_student(measurement("eager", 1, 4.0, 2.0), captured_ms=0.5)
    free = with_student(measurement("eager", 64, 4.0, 2.0), captured_ms=1.9)
    [finding] = launch_bound([bound, free])
    assert (finding.kind, finding.runner, finding.batch_size) == ("launch-bound", "eager", 1)
    assert finding.figures["launch_share"] == pytest.approx(1 - 0.5 / bound.student.median_ms)


def test_launch_bound_without_capture_is_eager_that_is_slow_at_small_batches_only() -> None:
    def at(batch_size: int, eager: float) -> list[Measurement]:
        return [measurement("eager", batch_size, 9.0, eager), measurement("onnxruntime", batch_size, 9.0, 1.0)]

    [finding] = launch_bound([*at(1, 4.0), *at(64, 1.0)])
    assert finding.figures["launch_share"] == pytest.approx(0.75)
    assert "4.0 times as long as onnxruntime at batch 1" in finding.sentence
    assert not list(launch_bound([*at(1, 4.0), *at(64, 4.0)]))
    assert not list(launch_bound(at(1, 4.0)))


def test_copy_bound() -> None:
    made = measurement("eager", 1, 2.0, 1.0)
    bound = with_student(made, copy_in_ms=0.8, copy_out_ms=0.2, end_to_end_ms=2.0)
    [finding] = copy_bound([made, bound])
    assert finding.figures == {"copies_ms": 1.0, "end_to_end_ms": 2.0, "copy_share": 0.5}
    assert not list(copy_bound([with_student(made, copy_in_ms=0.1, copy_out_ms=0.1, end_to_end_ms=2.0)]))
