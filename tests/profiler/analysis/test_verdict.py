from __future__ import annotations

import pytest

from litdeploy.errors import GateError
from litdeploy.profiler.analysis.verdict import check_gates, sentence
from litdeploy.profiler.schema import Report, Side
from litdeploy.storage.records import Accuracy
from tests.profiler.conftest import measurement, side

TEACHER, STUDENT = side("ResNet-56", 56, 9, 0.8944), side("ResNet-20", 20, 3, 0.8906)


def with_accuracy(role: Side, **accuracy: float) -> Side:
    found = {split: Accuracy(top1=top1, loss=0.1, images=360) for split, top1 in accuracy.items()}
    return role.model_copy(update={"accuracy": found})


def test_faster_at_less_accuracy() -> None:
    assert sentence(TEACHER, STUDENT, measurement("onnxruntime", 1, 5.2, 2.0), "a processor") == (
        "ResNet-20 answers 2.6× as fast as ResNet-56 in onnxruntime at batch 1 on a processor, "
        "at 0.38 points less accuracy (89.44 → 89.06 % on the test split)."
    )


def test_slower_is_said() -> None:
    said = sentence(TEACHER, STUDENT, measurement("eager", 8, 1.0, 2.0), "a processor")
    assert said.startswith("ResNet-20 is slower than ResNet-56: 0.50× as fast in eager at batch 8 on a processor, ")


def test_no_clear_difference_is_said() -> None:
    made = measurement("eager", 8, 1.02, 1.0)
    unclear = made.comparison.model_copy(update={"verdict": "unclear", "reason": "it was noisy"})
    said = sentence(TEACHER, STUDENT, made.model_copy(update={"comparison": unclear}), "a processor")
    assert said.startswith(
        "No clear difference in speed between ResNet-20 and ResNet-56 in eager at batch 8 on a processor "
        "(the ratio of the medians is 1.02×, but it was noisy), at "
    )


def test_the_same_is_said() -> None:
    said = sentence(TEACHER, STUDENT, measurement("eager", 8, 1.0, 1.0), "a processor")
    assert said.startswith("ResNet-20 is as fast as ResNet-56: 1.00× in eager at batch 8 on a processor, at ")


@pytest.mark.parametrize(
    ("teacher", "student", "said"),
    [
        ({"test": 0.95}, {"test": 0.97}, "at 2.0 points more accuracy (95.0 → 97.0 % on the test split)."),
        ({"test": 0.95}, {"test": 0.95}, "at the same accuracy (95.0 → 95.0 % on the test split)."),
        (
            {"validation": 0.95},
            {"validation": 0.94},
            "at 1.0 points less accuracy (95.0 → 94.0 % on the validation split).",
        ),
        ({"test": 0.95}, {"validation": 0.95}, "and what that cost in accuracy was not measured."),
        ({}, {}, "and what that cost in accuracy was not measured."),
    ],
)
def test_accuracy(teacher: dict[str, float], student: dict[str, float], said: str) -> None:
    roles = with_accuracy(TEACHER, **teacher), with_accuracy(STUDENT, **student)
    assert sentence(*roles, measurement("eager", 1, 2.0, 1.0), "a processor").endswith(f", {said}")


def with_speedup(report: Report, speedup: float, low: float | None, high: float | None) -> Report:
    """The report with this speed-up in its headline measurement."""
    comparison = report.headline.comparison.model_copy(
        update={"speedup": speedup, "speedup_low": low, "speedup_high": high}
    )
    changed = report.headline.model_copy(update={"comparison": comparison})
    return report.model_copy(
        update={"measurements": tuple(changed if each is report.headline else each for each in report.measurements)}
    )


def test_the_low_end_decides(report: Report) -> None:
    found = with_speedup(report, 3.1, 2.96, 3.25)
    check_gates(found, min_speedup=2.96)
    with pytest.raises(
        GateError, match=r"onnxruntime at batch 1 is 3.10×.*between 2.96× and 3.25×.*--min-speedup 3\.$"
    ):
        check_gates(found, min_speedup=3)


def test_without_an_interval_no_speedup_is_shown(report: Report) -> None:
    found = with_speedup(report, 31, None, None)
    with pytest.raises(GateError, match="too few samples"):
        check_gates(found, min_speedup=1)


def test_a_speedup_that_the_processor_time_contradicts_keeps_no_limit(report: Report) -> None:
    found = with_speedup(report, 11.9, 7.5, 18.9)
    comparison = found.headline.comparison.model_copy(update={"verdict": "unclear", "reason": "calls waited"})
    headline = found.headline.model_copy(update={"comparison": comparison})
    with pytest.raises(GateError, match=r"cannot be trusted \(calls waited\)"):
        check_gates(found.model_copy(update={"measurements": (headline,)}), min_speedup=3)


@pytest.mark.parametrize(("drop", "kept"), [(0.4, True), (0.38, True), (0.37, False), (0, False)])
def test_the_accuracy_drop_is_the_one_that_is_shown(report: Report, drop: float, kept: bool) -> None:
    assert round(100 * (0.8944 - 0.8906), 2) == 0.38
    if kept:
        check_gates(report, max_accuracy_drop=drop)
    else:
        with pytest.raises(GateError, match=r"test split is 0.38 points below its teacher's \(89.44 % → 89.06 %\)"):
            check_gates(report, max_accuracy_drop=drop)


def test_a_student_that_is_better_drops_nothing(report: Report) -> None:
    better = report.student.model_copy(update={"accuracy": {"test": Accuracy(top1=0.95, loss=0.1, images=10_000)}})
    check_gates(report.model_copy(update={"student": better}), max_accuracy_drop=0)


def test_an_accuracy_that_is_not_known_keeps_no_limit(report: Report) -> None:
    without = report.model_copy(update={"student": report.student.model_copy(update={"accuracy": {}})})
    with pytest.raises(GateError, match="unknown"):
        check_gates(without, max_accuracy_drop=100)


def test_both_limits_are_told_at_once(report: Report) -> None:
    with pytest.raises(GateError, match=r"--min-speedup 9.*--max-accuracy-drop 0.1") as raised:
        check_gates(report, min_speedup=9, max_accuracy_drop=0.1)
    assert raised.value.exit_code == 3
    check_gates(report)
