from __future__ import annotations

import math

import pytest
import torch

from litdeploy.config.spec import InputSpec
from litdeploy.config.target import Tolerance
from litdeploy.errors import DataError
from litdeploy.storage.records import Accuracy, BatchParity, Measures
from litdeploy.tasks import TASKS

SPEC = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.5,))
CLASSIFICATION = TASKS["classification"]
LOGITS = torch.tensor([[1.0, 2.0], [4.0, -8.0]])


def compare(expected: torch.Tensor, found: torch.Tensor, batch_size: int, tolerance: Tolerance) -> BatchParity:
    return CLASSIFICATION.compare(expected, found, batch_size, tolerance, SPEC)


def accuracy(top1: float, images: int = 10_000) -> Accuracy:
    return Accuracy(top1=top1, loss=0.5, images=images)


def test_batches_of_unlike_sizes_count_by_image() -> None:
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    batches = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    found = CLASSIFICATION.evaluate(lambda batch: batch, batches, SPEC)
    right, wrong = math.log1p(math.exp(-3)), math.log1p(math.exp(3))
    assert found.images == 4
    assert found.top1 == 3 / 4
    assert found.loss == pytest.approx((2 * right + wrong + math.log(2)) / 4)


def test_a_mean_over_many_batches_keeps_its_digits() -> None:
    logits, labels = torch.tensor([[0.0, 0.1]]), torch.tensor([1])
    found = CLASSIFICATION.evaluate(lambda batch: batch, [(logits, labels)] * 20_000, SPEC)
    assert found.loss == pytest.approx(math.log1p(math.exp(-0.1)), rel=1e-6)


def test_no_images_are_an_error() -> None:
    with pytest.raises(DataError, match="nothing to evaluate on"):
        CLASSIFICATION.evaluate(lambda batch: batch, [], SPEC)


def test_equal_logits_are_within_a_tolerance_of_nothing() -> None:
    found = compare(LOGITS, LOGITS, 2, Tolerance(atol=0, rtol=0, top1=1))
    assert (found.max_absolute, found.max_relative, found.top1, found.within) == (0, 0, 1, True)


@pytest.mark.parametrize(
    ("atol", "rtol", "within"),
    [(0.5, 0.0, True), (0.49, 0.0, False), (0.0, 1 / 16, True), (0.0, 0.06, False), (0.25, 1 / 32, True)],
)
def test_the_limit_is_absolute_plus_a_share_of_the_largest_logit(atol: float, rtol: float, within: bool) -> None:
    found = compare(LOGITS, LOGITS - torch.tensor([[0.5, 0.0], [0.0, 0.0]]), 2, Tolerance(atol=atol, rtol=rtol))
    assert (found.max_absolute, found.max_relative) == (0.5, 1 / 16)
    assert found.within is within


@pytest.mark.parametrize(("limit", "within"), [(0.5, True), (0.51, False)])
def test_another_class_counts_whatever_the_difference(limit: float, within: bool) -> None:
    found = compare(LOGITS, LOGITS.flip(0), 2, Tolerance(atol=100, top1=0))
    assert (found.top1, found.within) == (0, True)
    half = torch.stack([LOGITS[0], LOGITS[0]])
    found = compare(LOGITS, half, 2, Tolerance(atol=100, top1=limit))
    assert (found.top1, found.within) == (0.5, within)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_what_is_not_finite_is_never_within(value: float, sides: tuple[bool, bool]) -> None:
    reference, candidate = (LOGITS.masked_fill(LOGITS == 1, value) if bad else LOGITS for bad in sides)
    found = compare(reference, candidate, 2, Tolerance(atol=1e30, rtol=1, top1=0))
    assert (found.max_absolute, found.max_relative, found.within) == (None, None, False)


def test_a_reference_of_zeros_is_compared_absolutely() -> None:
    assert compare(LOGITS * 0, LOGITS * 0, 2, Tolerance(atol=0)).within
    assert not compare(LOGITS * 0, LOGITS, 2, Tolerance(top1=0)).within


@pytest.mark.parametrize(
    ("images", "right", "limit", "within"),
    [
        (10_000, 9_000, 0.001, True),
        (10_000, 8_990, 0.001, True),
        (10_000, 8_989, 0.001, False),
        (10_000, 9_100, 0.001, True),
        (100, 89, 0.001, True),
        (100, 88, 0.001, False),
        (100, 88, 0.02, True),
    ],
)
def test_accuracy_may_fall_by_a_share_and_by_one_image_always(
    images: int, right: int, limit: float, within: bool
) -> None:
    reference, candidate = (Accuracy(top1=each / images, loss=0.5, images=images) for each in (0.9 * images, right))
    found = CLASSIFICATION.compare_scores(reference, candidate, Tolerance(accuracy=limit))
    assert found.lost == 0.9 * images - right
    assert found.within is within


def test_the_loss_weighs_labels_and_the_teachers_answers() -> None:
    student, teacher, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([0])
    hard = math.log1p(math.exp(-1))
    p, q = 1 / (1 + math.exp(1)), 1 / (1 + math.exp(-0.5))  # of class 0 at τ = 2: the teacher's and the student's
    soft = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = CLASSIFICATION.loss(student, teacher, labels, alpha=0.25, temperature=2.0)
    assert found.item() == pytest.approx(0.25 * hard + 0.75 * 4 * soft, rel=1e-6)


def test_a_report_names_points_between_the_figures_as_shown() -> None:
    teacher, student = {"test": accuracy(0.89664)}, {"test": accuracy(0.8761), "validation": accuracy(0.9, 360)}
    assert CLASSIFICATION.figure(teacher["test"]) == "89.66 %"
    assert CLASSIFICATION.figure(accuracy(0.89664, 360)) == "89.7 %"
    assert CLASSIFICATION.points(teacher["test"], student["test"]) == -2.05
    assert CLASSIFICATION.headline(teacher, student) == ("Accuracy", "−2.05 points", "89.66 % → 87.61 %, test")
    assert CLASSIFICATION.verdict(teacher, student) == (
        ", at 2.05 points less accuracy (89.66 → 87.61 % on the test split)"
    )
    assert [(row.label, row.teacher, row.change) for row in CLASSIFICATION.rows(teacher, student)] == [
        ("Accuracy, test", "89.66 %", "−2.05 points"),
        ("Accuracy, validation", "not measured", "–"),
    ]
    assert CLASSIFICATION.headline({}, student) is None
    assert CLASSIFICATION.verdict({}, student) == ", and what that cost in accuracy was not measured"
    assert CLASSIFICATION.verdict(teacher, teacher) == ", at the same accuracy (89.66 → 89.66 % on the test split)"


def test_the_interval_is_wilsons() -> None:
    # Newcombe, Statistics in Medicine 1998, table I.
    assert CLASSIFICATION.interval(accuracy(81 / 263, 263)) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert CLASSIFICATION.interval(accuracy(0, 20)) == pytest.approx((0, 0.1611), abs=5e-5)


@pytest.mark.parametrize(("top1", "chance"), [(0.12, 0.1), (0.18, 0.1), (0.2, None)])
def test_an_accuracy_near_guessing_is_noticed(top1: float, chance: float | None) -> None:
    assert CLASSIFICATION.chance(accuracy(top1), 10) == chance


def test_without_labels_the_teachers_classes_are_compared() -> None:
    teacher, student = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    batches = [(torch.zeros(2, 1), torch.tensor([-1, -1]))]
    found = CLASSIFICATION.evaluate(lambda _: student, batches, SPEC, lambda _: teacher)
    p, q = teacher.softmax(1), student.softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean().item()
    assert found.values == {"agreement": 0.5, "divergence": pytest.approx(divergence)}
    assert (found.images, found.correct) == (2, None)
    with pytest.raises(DataError, match=r"no labels to compare with.*no teacher is given\. Name it: --teacher FILE"):
        CLASSIFICATION.evaluate(lambda _: student, batches, SPEC)


def test_a_report_without_labels_says_so() -> None:
    score = Measures(task="classification", values={"agreement": 0.98214, "divergence": 0.04}, images=900)
    student = {"test": score}
    assert CLASSIFICATION.figure(score) == "98.21 %"
    assert CLASSIFICATION.verdict({}, student, 10) == (
        "; same class as the teacher: 98.21 % (test split; not compared with labels)"
    )
    assert CLASSIFICATION.headline({}, student) == (
        "Same class as the teacher",
        "98.21 %",
        "KL divergence from the teacher: 0.0400; test",
    )
    assert next(row.label for row in CLASSIFICATION.rows({}, student)) == "Same class as the teacher, test"
    assert CLASSIFICATION.points(score, score) is CLASSIFICATION.interval(score) is None
    assert CLASSIFICATION.chance(score, 10) is None
    assert CLASSIFICATION.key(score) == 0.98214


def test_an_accuracy_of_invented_labels_is_not_called_the_same() -> None:
    scores = {"test": accuracy(0.003)}
    assert CLASSIFICATION.verdict(scores, scores, 1000) == (
        "; what that cost is unknown: the teacher's own accuracy (0.30 → 0.30 % on the test split) is hardly better "
        "than guessing (0.10 %), so its input or the labels are not what it was trained on"
    )
    assert CLASSIFICATION.verdict(scores, scores) == ", at the same accuracy (0.30 → 0.30 % on the test split)"
