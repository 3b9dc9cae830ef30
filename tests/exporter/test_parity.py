from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from litdeploy.config.spec import InputSpec
from litdeploy.config.target import Tolerance
from litdeploy.exporter.onnx import export_onnx
from litdeploy.exporter.parity import verify
from litdeploy.networks import Network
from litdeploy.runtime import open_runner
from litdeploy.storage.records import Accuracy, BatchParity
from litdeploy.tasks import TASKS

CPU = torch.device("cpu")
LOGITS = torch.tensor([[1.0, 2.0], [4.0, -8.0]])
CLASSIFICATION = TASKS["classification"]
SPEC = InputSpec(shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)


def compare(expected: torch.Tensor, found: torch.Tensor, batch_size: int, tolerance: Tolerance) -> BatchParity:
    return CLASSIFICATION.compare(expected, found, batch_size, tolerance, SPEC)


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


def test_each_batch_size_sees_whole_batches_of_the_images(student: Network, tmp_path: Path) -> None:
    export_onnx(student, tmp_path / "student.onnx", None)
    with (
        open_runner("eager", network=student, device=CPU) as reference,
        open_runner("onnxruntime", onnx_path=tmp_path / "student.onnx", device=CPU) as candidate,
    ):
        parity = verify(reference, candidate, student.example(19), (1, 2, 8, 24), Tolerance(), student.spec.input)
    assert [(each.batch_size, each.images) for each in parity.batches] == [(1, 16), (2, 18), (8, 16), (24, 24)]
    assert parity.within
    assert all(each.max_absolute is not None and 0 < each.max_absolute < 1e-4 for each in parity.batches)
    assert (parity.reference, parity.candidate) == ("eager", "onnxruntime")
    assert "beyond the limit" not in parity.summary()


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


def test_labels_are_judged_too(student: Network) -> None:
    batch = student.example(24)
    with (
        open_runner("eager", network=student, device=CPU) as reference,
        open_runner("eager", network=student, device=CPU, precision="bf16") as candidate,
    ):
        labels = reference.run(batch).argmax(1)
        tolerance = Tolerance(atol=1, rtol=1, top1=0)
        parity = verify(reference, candidate, batch, (1, 8), tolerance, student.spec.input, labels)
    assert parity.accuracy is not None
    assert parity.accuracy.reference.top1 == 1
    assert parity.accuracy.lost == 24 - round(24 * parity.accuracy.candidate.top1)
    assert "accuracy on 24 samples: 100.00% → " in parity.summary()
    rejected = parity.with_labels(parity.accuracy.model_copy(update={"within": False}))
    assert not rejected.within
    assert "beyond the limit" in rejected.summary()


def test_the_class_is_judged_over_all_batch_sizes_together(student: Network) -> None:
    batch = student.example(40)
    with (
        open_runner("eager", network=student, device=CPU) as reference,
        open_runner("eager", network=student, device=CPU, precision="bf16") as candidate,
    ):
        parity = verify(reference, candidate, batch, (1, 8), Tolerance(atol=1, rtol=1, top1=0), student.spec.input)
        assert 0 < parity.top1 <= 1
        assert parity.top1 == pytest.approx((16 * parity.batches[0].top1 + 40 * parity.batches[1].top1) / 56)
        strict = verify(reference, reference, batch, (1, 8), Tolerance(top1=1), student.spec.input)
    assert strict.within
