from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which is for Linux and Windows only")

from litdeploy.trainer.kernels import reference, section_loss
from litdeploy.trainer.kernels.scaling import BLOCK, scaled

# Of the gradient, which is rounded twice where torch rounds it once. Triton's interpreter cuts bfloat16 off.
TOLERANCE = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-9},
    torch.bfloat16: {"rtol": 2**-6, "atol": 1e-9},
    torch.float16: {"rtol": 2**-9, "atol": 1e-7},
}
SHAPES = {
    "one element": [(1, 1, 1, 1)],
    "odd": [(3, 5, 7, 9)],
    "exactly a block": [(2, BLOCK // 2)],
    "one more than a block": [(1, BLOCK + 1)],
    "a ResNet's": [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)],
    "five of all kinds": [(3,), (2, 3, 5, 7), (1, BLOCK * 2 + 5), (4, 1, 1, 1), (2, 197, 24)],
}


def tensors(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator).to(device, dtype) for shape in shapes]


def check(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
    """Value and gradient against the reference; the upstream gradients are not one, and not all the same."""
    students = [student.requires_grad_() for student in students]
    found, expected = (losses(students, teachers) for losses in (section_loss.section_losses, reference.section_losses))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    upstream = torch.arange(len(students), device=found.device) * 1.5 - 0.7
    mine, theirs = (torch.autograd.grad(losses, students, upstream) for losses in (found, expected))
    for student, one, other in zip(students, mine, theirs, strict=True):
        assert one.dtype == student.dtype
        torch.testing.assert_close(one, other, **TOLERANCE[student.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_value_and_gradient(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
    check(tensors(shapes, dtype, device, 0), tensors(shapes, dtype, device, 1))


@pytest.mark.parametrize("student_last", [False, True])
@pytest.mark.parametrize("teacher_last", [False, True])
def test_channels_last(student_last: bool, teacher_last: bool, device: torch.device) -> None:
    shapes = [(3, 5, 7, 9), (2, 8, 4, 4)]
    formats = {False: torch.contiguous_format, True: torch.channels_last}
    students = [s.to(memory_format=formats[student_last]) for s in tensors(shapes, torch.float32, device, 0)]
    teachers = [t.to(memory_format=formats[teacher_last]) for t in tensors(shapes, torch.float32, device, 1)]
    check(students, teachers)


def test_the_gradient_lies_in_memory_as_the_student_does(device: torch.device) -> None:
    (student,) = tensors([(3, 5, 7, 9)], torch.float32, device, 0)
    student = student.to(memory_format=torch.channels_last).requires_grad_()
    losses = section_loss.section_losses([student], tensors([(3, 5, 7, 9)], torch.float32, device, 1))
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert gradient.stride() == student.stride()


def test_tensors_with_gaps_in_memory(device: torch.device) -> None:
    wide, other = tensors([(4, 6, 10, 9), (4, 6, 10, 9)], torch.float32, device, 0)
    check([wide[::2, :, 1::3], other.transpose(1, 3)], [other[1::2, :, ::3][:, :, :3], wide.transpose(1, 3)])


def test_student_and_teacher_of_different_types(device: torch.device) -> None:
    check(tensors([(3, 5, 7, 9)], torch.float32, device, 0), tensors([(3, 5, 7, 9)], torch.bfloat16, device, 1))


def test_squares_that_float16_cannot_hold(device: torch.device) -> None:
    student = torch.full((3, 700), 300.0, dtype=torch.float16, device=device)
    assert section_loss.section_losses([student], [-student]).item() == pytest.approx(360_000, rel=1e-6)


def test_more_partial_sums_than_are_read_at_once(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(section_loss, "PARTIALS", 4)
    shapes = [(9 * BLOCK + 1,), (4 * BLOCK,)]
    check(tensors(shapes, torch.float32, device, 0), tensors(shapes, torch.float32, device, 1))


def test_the_same_inputs_give_the_same_bits(device: torch.device) -> None:
    students, teachers = (tensors([(7 * BLOCK + 3,)], torch.float32, device, seed) for seed in (0, 1))
    first, second = (section_loss.section_losses(students, teachers) for _ in range(2))
    assert torch.equal(first, second)


def test_a_teacher_gets_no_gradient(device: torch.device) -> None:
    student, teacher = (one.requires_grad_() for one in tensors([(5,), (5,)], torch.float32, device, 0))
    section_loss.section_losses([student], [teacher]).sum().backward()
    assert teacher.grad is None


def test_they_are_proper_operators(device: torch.device) -> None:
    students = [student.requires_grad_() for student in tensors([(3, 5), (2, 7)], torch.float32, device, 0)]
    teachers = tensors([(3, 5), (2, 7)], torch.float32, device, 1)
    torch.library.opcheck(section_loss.section_losses_op, (students, teachers))
    torch.library.opcheck(scaled, (teachers, torch.ones(2, device=device), [15, 14]))


def test_torch_compile_keeps_it_in_its_graph(device: torch.device) -> None:
    (student,), (teacher,) = (tensors([(3, 5, 7, 9)], torch.float32, device, seed) for seed in (0, 1))
    student.requires_grad_()

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return 2 * section_loss.section_losses([student * 3], [teacher]).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = (torch.autograd.grad(f(student, teacher), student)[0] for f in (loss, compiled))
    torch.testing.assert_close(found, expected)
