from __future__ import annotations

import pytest

from litdeploy.profiler.analysis.verdict import sentence
from litdeploy.profiler.schema import Side
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
