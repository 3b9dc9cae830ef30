from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from litdeploy.config.recipe import Augmentation
from litdeploy.config.spec import InputSpec
from litdeploy.data import augment, draw_crops, normalise
from litdeploy.trainer.kernels.reference import augmented, distillation_loss, section_losses

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]], requires_grad=True)
TEACHER = torch.tensor([[3.0, -1.0, 0.0], [0.0, 1.0, 0.0]])
LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_formula(temperature: float) -> None:
    p, q = F.softmax(TEACHER / temperature, 1), F.softmax(LOGITS / temperature, 1)
    kl = (p * (p / q).log()).sum() / 2
    expected = 0.3 * F.cross_entropy(LOGITS, LABELS) + 0.7 * temperature**2 * kl
    torch.testing.assert_close(distillation_loss(LOGITS, TEACHER, LABELS, 0.3, temperature), expected)


def test_a_student_that_equals_its_teacher_has_no_soft_loss() -> None:
    assert distillation_loss(TEACHER, TEACHER, LABELS, 0.0, 4.0).abs() < 1e-6


def test_section_losses_are_means_over_each_sections_elements_in_float32() -> None:
    students = [torch.full((2, 3), 300.0, dtype=torch.float16), torch.tensor([1.0, 2.0])]
    teachers = [torch.full((2, 3), -300.0, dtype=torch.float16), torch.tensor([0.0, 0.0])]
    assert torch.equal(section_losses(students, teachers), torch.tensor([360_000.0, 2.5]))


def test_teachers_get_no_gradient() -> None:
    teacher = TEACHER.clone().requires_grad_()
    section_losses([LOGITS], [teacher]).sum().backward()
    distillation_loss(LOGITS, teacher, LABELS, 0.3, 4.0).backward()
    assert teacher.grad is None


def test_augmented_is_the_way_that_the_data_goes() -> None:
    source = torch.randint(256, (7, 3, 6, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    rows, spec = torch.tensor([6, 0, 6]), InputSpec(shape=(3, 6, 5), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    crops = draw_crops(3, Augmentation(padding=4, flip=True), torch.Generator().manual_seed(0))
    found = augmented(source, rows, crops, spec, torch.bfloat16)
    assert torch.equal(found, normalise(augment(source[rows], crops), spec).bfloat16())
    assert found.is_contiguous(memory_format=torch.channels_last)
