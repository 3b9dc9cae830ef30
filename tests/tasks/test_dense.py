from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from litdeploy.config.spec import InputSpec, NetworkSpec
from litdeploy.config.target import Tolerance
from litdeploy.errors import DataError, RunnerError
from litdeploy.storage.records import Measures
from litdeploy.tasks import TASKS

TASK = TASKS["dense"]
SPEC = InputSpec(shape=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
NONE = torch.full((2,), -1)


def maps(seed: int = 0, size: int = 8) -> torch.Tensor:
    return torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_that_of_a_classifier_of_pixels() -> None:
    student, teacher = maps(0), maps(1)
    found = TASK.loss(student, teacher, NONE, 0.0, 3.0)
    pixels = [each.permute(0, 2, 3, 1).reshape(-1, 4) for each in (student, teacher)]
    labels = torch.zeros(len(pixels[0]), dtype=torch.int64)
    torch.testing.assert_close(found, TASKS["classification"].loss(pixels[0], pixels[1], labels, 0.0, 3.0))
    assert TASK.loss(teacher, teacher, NONE, 0.0, 3.0).abs() < 1e-6


def test_label_maps_are_of_any_resolution_and_other_numbers_are_not_compared() -> None:
    student, teacher = maps(0, 4).requires_grad_(), maps(1, 4)
    labels = torch.randint(0, 4, (2, 8, 8), generator=torch.Generator().manual_seed(2))
    labels[:, :2] = 255
    found = TASK.loss(student, teacher, labels, 1.0, 3.0)
    at_labels = F.interpolate(student, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, F.cross_entropy(at_labels, labels, ignore_index=255))
    found.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    with pytest.raises(DataError, match=r"labels of shape \(2,\).*label maps"):
        TASK.loss(student, teacher, torch.zeros(2, dtype=torch.int64), 0.5, 3.0)


def test_without_labels_pixels_are_compared_with_the_teachers() -> None:
    teacher, student = maps(0), maps(0)
    student[0, :, :4] = -student[0, :, :4]
    found = TASK.evaluate(lambda _: student, [(teacher, NONE)], SPEC, lambda batch: batch)
    assert isinstance(found, Measures)
    same = (student.argmax(1) == teacher.argmax(1)).float().mean().item()
    assert found.values["pixel_agreement"] == pytest.approx(same)
    assert 0.5 < same < 1
    assert found.values["pixel_divergence"] > 0
    assert TASK.figure(found) == f"{100 * same:.2f} %"
    assert TASK.key(found) == found.values["pixel_agreement"]
    with pytest.raises(DataError, match="--teacher FILE"):
        TASK.evaluate(lambda batch: batch, [(teacher, NONE)], SPEC)
    with pytest.raises(RunnerError, match="cannot be compared with outputs of"):
        TASK.evaluate(lambda batch: batch[:, :, :4], [(teacher, NONE)], SPEC, lambda batch: batch)
    with pytest.raises(DataError, match="nothing to evaluate on"):
        TASK.evaluate(lambda batch: batch, [], SPEC, lambda batch: batch)


def test_with_label_maps_accuracy_and_iou_are_measured() -> None:
    logits = torch.full((1, 3, 2, 2), -1.0)
    logits[0, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])] = 1
    labels = torch.tensor([[[0, 1], [1, 255]]])
    found = TASK.evaluate(lambda batch: batch, [(logits, labels)], SPEC)
    assert isinstance(found, Measures)
    assert found.values["pixel_accuracy"] == pytest.approx(2 / 3)
    assert found.values["mean_iou"] == pytest.approx((1 / 2 + 1 / 2) / 2)  # the third class does not occur
    with pytest.raises(DataError, match="no pixel"):
        TASK.evaluate(lambda batch: batch, [(logits, torch.full((1, 2, 2), 255))], SPEC)


def test_labels_of_whole_images_are_refused() -> None:
    spec = NetworkSpec(name="unet", input=SPEC, task="dense")
    with pytest.raises(DataError, match=r"cats has a label for each image \(a, b\).*--labels none"):
        TASK.check_classes("cats", ("a", "b"), False, spec, 4)
    TASK.check_classes("cats", (), False, spec, 4)
    assert TASK.class_count((4, 8, 8), SPEC) == 4
    assert TASK.class_count((4,), SPEC) is None


def test_files_are_compared_by_pixels() -> None:
    expected = maps(0)
    found = TASK.compare(expected, expected + 1e-6, 2, Tolerance(), SPEC)
    assert found.within
    assert found.top1 == 1
    assert not TASK.compare(expected, -expected, 2, Tolerance(), SPEC).within
