"""The LIT section loss: all sections in one launch, value and gradient in one pass over S and T.

A CUDA graph captures it unchanged: addresses and sizes are arguments of the kernel (Triton's tuples), so that no table
of addresses has to be copied to the device or can become stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from litdeploy.trainer.kernels.scaling import BLOCK, OPTIONS, scaled

PARTIALS = 1024


@triton.jit
def _difference_kernel(
    students,  # tuple of pointers, one a section: (size,) in the order of memory
    teachers,  # likewise
    differences,  # likewise, written
    sizes,  # tuple of integers: elements of each section
    partials_ptr,  # float32, (programs,), written: sums of squares
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    first = 0
    for i in tl.static_range(len(students)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (program >= first) & (program < first + blocks):
            offsets = (program - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offsets < sizes[i]
            student = tl.load(students[i] + offsets, mask=mask, other=0.0).to(tl.float32)
            teacher = tl.load(teachers[i] + offsets, mask=mask, other=0.0).to(tl.float32)
            difference = student - teacher
            tl.store(differences[i] + offsets, (2 * difference).to(differences[i].dtype.element_ty), mask=mask)
            tl.store(partials_ptr + program, tl.sum(difference * difference, axis=0))
        first += blocks


@triton.jit
def _mean_kernel(
    partials_ptr,  # float32, (programs of the kernel above,)
    sizes,  # tuple of integers: elements of each section
    means_ptr,  # float32, (sections,), written
    BLOCK: tl.constexpr,  # of the kernel above
    PARTIALS: tl.constexpr,
):
    section = tl.program_id(0)
    first = 0
    for i in tl.static_range(len(sizes)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if section == i:
            sums = tl.zeros((PARTIALS,), tl.float32)
            offsets = tl.arange(0, PARTIALS)
            while tl.min(offsets, axis=0) < blocks:
                sums += tl.load(partials_ptr + first + offsets, mask=offsets < blocks, other=0.0)
                offsets += PARTIALS
            tl.store(means_ptr + i, tl.sum(sums, axis=0) / sizes[i])
        first += blocks


@torch.library.custom_op("litdeploy::section_losses", mutates_args=())
def section_losses_op(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The means, and for the backward pass 2 (S_i − T_i): the gradient but for the division by the number of elements.

    Undivided, because in float16 the gradient of a mean over a million elements would be a subnormal number.

    Args:
        students, teachers: see `reference.section_losses`.

    Returns:
        float32 (sections,), and one tensor a section in the student's type and, where it is dense, its strides.
    """
    differences = [torch.empty_like(student) for student in students]
    students = [_laid_out(tensor, like) for tensor, like in zip(students, differences, strict=True)]
    teachers = [_laid_out(tensor, like) for tensor, like in zip(teachers, differences, strict=True)]
    sizes = tuple(student.numel() for student in students)
    programs = sum(triton.cdiv(size, BLOCK) for size in sizes)
    partials = torch.empty(programs, dtype=torch.float32, device=students[0].device)
    means = torch.empty(len(sizes), dtype=torch.float32, device=students[0].device)
    with torch.cuda.device_of(means):
        _difference_kernel[(programs,)](
            tuple(students), tuple(teachers), tuple(differences), sizes, partials, BLOCK=BLOCK, **OPTIONS
        )
        _mean_kernel[(len(sizes),)](partials, sizes, means, BLOCK=BLOCK, PARTIALS=PARTIALS, **OPTIONS)
    return means, differences


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in another's order of memory; copied where it has not that order already."""
    assert tensor.shape == like.shape
    pairs = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    if all(size == 1 or stride == wanted for size, stride, wanted in pairs):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


@section_losses_op.register_fake
def _(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    means = students[0].new_empty(len(students), dtype=torch.float32)
    return means, [torch.empty_like(student) for student in students]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    _, differences = output
    ctx.set_materialize_grads(False)  # or zeros as large as all sections would be written for the second output
    ctx.save_for_backward(*differences)


def _backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[list[Tensor | None], list[None]]:
    differences = list(ctx.saved_tensors)
    nothing = [None] * len(differences)
    if upstream is None:
        return list(nothing), nothing
    return list(scaled(differences, upstream, [difference.numel() for difference in differences])), nothing


section_losses_op.register_autograd(_backward, setup_context=_keep)


def section_losses(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """`reference.section_losses` by Triton: float32, float16 or bfloat16, in any memory order.

    S and T are read once each, where each section's two have one dense order of memory; other tensors are copied first.
    The sums have one order, so that the same inputs give the same bits.
    """
    means: Tensor = section_losses_op(list(students), [teacher.detach() for teacher in teachers])[0]
    return means
