from __future__ import annotations

from typing import Any

import pytest

from litdeploy.profiler.analysis.diagnosis import bounds, copy_bound, disturbances, ideal_ratio, launch_bound
from litdeploy.profiler.machine.roofline import Rates, Work
from litdeploy.profiler.schema import Conditions, Gpu, Measurement, RawSamples, Samples, SectionTime, Timed
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


QUIET = Conditions(seconds=2.0, cores=(0,), other_load=0.01, stolen=0.0, preemptions=2)


def under(conditions: Conditions, batch_size: int = 1, **fields: Any) -> Measurement:
    made = measurement("eager", batch_size, 2.0, 1.0)
    return made.model_copy(update={"conditions": conditions, **fields})


def raw(teacher: list[float], student: list[float], starts: list[float]) -> RawSamples:
    timed = Timed(
        clock="wall",
        order="TSST" * (len(teacher) // 2),
        starts_ms=tuple(starts),
        teacher=Samples(1.0, tuple(teacher)),
        student=Samples(1.0, tuple(student)),
        stopped="samples",
        overhead_ms=0.0,
        conditions=QUIET,
    )
    return RawSamples(runner="eager", batch_size=1, timed=timed)


def test_nothing_is_said_of_a_quiet_machine() -> None:
    steady = raw([2.0] * 16, [1.0] * 16, [float(number) for number in range(32)])
    assert not list(disturbances([under(QUIET)], [steady]))


def test_the_worst_neighbour_is_told_once() -> None:
    busy = QUIET.model_copy(update={"other_load": 0.4, "preemptions": 1_234})
    worse = QUIET.model_copy(update={"other_load": 0.7, "stolen": 0.1})
    [finding] = disturbances([under(busy), under(worse, 8), under(QUIET, 64)], [])
    assert (finding.kind, finding.batch_size) == ("noisy neighbour", 8)
    assert finding.figures["other_load_cores"] == 0.7
    assert "70% of a core on the 1 core" in finding.sentence
    assert "the hypervisor gave 10%" in finding.sentence
    assert "2 of 3 measurements" in finding.sentence


def test_a_throttled_gpu() -> None:
    gpu = Gpu(
        clock_mhz=1200,
        clock_low_mhz=1100,
        max_clock_mhz=1980,
        memory_clock_mhz=2619,
        temperature_c=83,
        power_watts=700,
        throttle_reasons=("power cap",),
    )
    [finding] = disturbances([under(QUIET.model_copy(update={"gpu": gpu}))], [])
    assert finding.kind == "throttled"
    assert "(power cap): 1200 of 1980 MHz at 700 W and 83 °C" in finding.sentence
    free = gpu.model_copy(update={"throttle_reasons": ()})
    assert not list(disturbances([under(QUIET.model_copy(update={"gpu": free}))], []))


def test_a_used_up_quota() -> None:
    [finding] = disturbances([under(QUIET.model_copy(update={"quota_seconds": 0.5}))], [])
    assert finding.kind == "throttled"
    assert finding.figures["stopped_share"] == 0.25


@pytest.mark.parametrize(
    ("teacher", "student", "drifts"),
    [([2.0, 3.0], [1.0, 1.5], True), ([3.0, 2.0], [1.5, 1.0], True), ([2.0, 3.0], [1.0, 1.0], False)],
)
def test_drift_is_what_both_sides_have(teacher: list[float], student: list[float], drifts: bool) -> None:
    sides = [[first] * 8 + [second] * 8 for first, second in (teacher, student)]
    found = list(disturbances([under(QUIET)], [raw(*sides, [float(number) for number in range(32)])]))
    assert [finding.kind for finding in found] == ["drift"] * drifts


def test_behind_the_pace() -> None:
    starts = [20.0 * number for number in range(32)]
    calls = raw([2.0] * 16, [1.0] * 16, starts)
    assert not list(disturbances([under(QUIET, pace=50.0, scenario="paced")], [calls]))
    [finding] = disturbances([under(QUIET, pace=100.0, scenario="paced")], [calls])
    assert finding.figures == {"reached_per_second": pytest.approx(50), "asked_per_second": 100}
