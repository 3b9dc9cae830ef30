from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which is for Linux and Windows only")

from litdeploy.trainer.kernels import distillation, reference

# Of the gradient, which is rounded twice where torch rounds it once. Triton's interpreter cuts bfloat16 off.
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-6, "atol": 1e-6},
    torch.float16: {"rtol": 2**-9, "atol": 1e-6},
}


def batch(rows: int, classes: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits of the student and of the teacher, and labels."""
    generator = torch.Generator().manual_seed(rows * classes)
    student, teacher = (3 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    labels = torch.randint(classes, (rows,), generator=generator)
    return [student.to(device, dtype), teacher.to(device, dtype), labels.to(device)]


def check(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 0.3, temperature: float = 4.0) -> None:
    """Value and gradient against the reference; the upstream gradient is not one."""
    student = student.requires_grad_()
    found = distillation.distillation_loss(student, teacher, labels, alpha, temperature)
    expected = reference.distillation_loss(student.float(), teacher.float(), labels, alpha, temperature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.tensor(-2.5, device=student.device)
    mine, theirs = (torch.autograd.grad(loss, student, upstream)[0] for loss in (found, expected))
    assert mine.dtype == student.dtype
    torch.testing.assert_close(mine, theirs, **TOLERANCE[student.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("rows", "classes"), [(1, 2), (5, 10), (67, 10), (33, 100), (7, 127), (3, 1000), (2, 4096), (2, 4097), (3, 6001)]
)
def test_value_and_gradient(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> None:
    check(*batch(rows, classes, device, dtype))


@pytest.mark.parametrize("classes", [10, 5000])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 6.0])
def test_weights_and_temperatures(classes: int, alpha: float, temperature: float, device: torch.device) -> None:
    check(*batch(5, classes, device), alpha, temperature)


@pytest.mark.parametrize("classes", [10, 5000])
def test_logits_whose_exponentials_float32_cannot_hold(classes: int, device: torch.device) -> None:
    student, teacher, labels = batch(5, classes, device)
    check(student * 100, teacher * 100 + 1e4, labels)


@pytest.mark.parametrize("classes", [15, 16, 17, 64, 65])
def test_blocks_meet_where_they_should(classes: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(distillation, "MOST_CLASSES", 8)
    monkeypatch.setattr(distillation, "BLOCK", 16)
    check(*batch(3, classes, device))
    student, teacher, _ = batch(3, classes, device)
    check(student, teacher, torch.tensor([0, classes - 1, min(classes - 1, 16)], device=device))


def test_tensors_with_gaps_in_memory(device: torch.device) -> None:
    student, teacher, labels = batch(12, 30, device)
    check(student[::2, ::3], teacher.T[1:11, 3:9].T, labels[::2] % 10)


def test_labels_of_another_integer_type(device: torch.device) -> None:
    student, teacher, labels = batch(5, 10, device)
    found, expected = (
        distillation.distillation_loss(student, teacher, each, 0.3, 4.0) for each in (labels.int(), labels)
    )
    assert torch.equal(found, expected)


def test_the_same_inputs_give_the_same_bits(device: torch.device) -> None:
    first, second = (distillation.distillation_loss(*batch(67, 100, device), 0.3, 4.0) for _ in range(2))
    assert torch.equal(first, second)


def test_a_teacher_gets_no_gradient(device: torch.device) -> None:
    student, teacher, labels = batch(5, 10, device)
    distillation.distillation_loss(student.requires_grad_(), teacher.requires_grad_(), labels, 0.3, 4.0).backward()
    assert teacher.grad is None


def test_it_is_a_proper_operator(device: torch.device) -> None:
    student, teacher, labels = batch(5, 10, device)
    torch.library.opcheck(distillation.distillation_loss_op, (student.requires_grad_(), teacher, labels, 0.3, 4.0))


def test_torch_compile_keeps_it_in_its_graph(device: torch.device) -> None:
    student, teacher, labels = batch(5, 10, device)
    student.requires_grad_()

    def loss(student: Tensor) -> Tensor:
        return 2 * distillation.distillation_loss(student * 3, teacher, labels, 0.3, 4.0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = (torch.autograd.grad(f(student), student)[0] for f in (loss, compiled))
    torch.testing.assert_close(found, expected)
