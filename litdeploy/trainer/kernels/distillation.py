"""The distillation loss: value and gradient by the logits in one launch, and in one pass if a row fits into a block.

Shape suffixes: N images, K classes; in a kernel R rows and K classes of one tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from litdeploy.trainer.kernels.scaling import OPTIONS, scaled

# The most classes that registers hold at once; longer rows are read twice, in smaller blocks.
MOST_CLASSES = 4096
BLOCK = 2048
# Logits in a tile at least: several rows if the classes are few.
TILE = 512


@triton.jit
def _load(logits_ptr, teacher_ptr, offsets_RK, valid_1K):
    """A tile of both logits, -inf beyond the last class, where a maximum is not touched by it."""
    s_RK = tl.load(logits_ptr + offsets_RK, mask=valid_1K, other=float("-inf")).to(tl.float32)
    t_RK = tl.load(teacher_ptr + offsets_RK, mask=valid_1K, other=float("-inf")).to(tl.float32)
    return s_RK, t_RK


@triton.jit
def _sums(s_RK, t_RK, s_max_R, t_max_R, temperature):
    """Σ exp of S − max, of (S − max) / τ and of (T − max) / τ over a tile's classes."""
    s_RK = s_RK - s_max_R[:, None]
    t_RK = t_RK - t_max_R[:, None]
    hard_R = tl.sum(tl.exp(s_RK), axis=1)
    soft_R = tl.sum(tl.exp(s_RK / temperature), axis=1)
    teacher_R = tl.sum(tl.exp(t_RK / temperature), axis=1)
    return hard_R, soft_R, teacher_R


@triton.jit
def _finish(
    gradients_ptr,
    s_RK,
    t_RK,
    offsets_RK,
    valid_1K,
    hit_RK,
    inside_R,
    s_max_R,
    t_max_R,
    hard_R,
    soft_R,
    teacher_R,
    alpha,
    temperature,
):
    """Write a tile's gradient; return its share of each row's loss."""
    # Beyond the last class any finite number: -inf less -inf is none.
    s_RK = tl.where(valid_1K, s_RK - s_max_R[:, None], 0.0)
    t_RK = tl.where(valid_1K, t_RK - t_max_R[:, None], 0.0)
    hard_RK = s_RK - tl.log(hard_R)[:, None]
    soft_RK = s_RK / temperature - tl.log(soft_R)[:, None]
    teacher_RK = t_RK / temperature - tl.log(teacher_R)[:, None]
    p_RK = tl.exp(teacher_RK)
    ce_R = tl.sum(tl.where(hit_RK, -hard_RK, 0.0), axis=1)
    kl_R = tl.sum(tl.where(valid_1K, p_RK * (teacher_RK - soft_RK), 0.0), axis=1)
    hard_gradient_RK = tl.exp(hard_RK) - tl.where(hit_RK, 1.0, 0.0)
    gradient_RK = alpha * hard_gradient_RK + (1 - alpha) * temperature * (tl.exp(soft_RK) - p_RK)
    gradient_RK = gradient_RK.to(gradients_ptr.dtype.element_ty)
    tl.store(gradients_ptr + offsets_RK, gradient_RK, mask=valid_1K & inside_R[:, None])
    return alpha * ce_R + (1 - alpha) * temperature * temperature * kl_R


@triton.jit
def _rows_kernel(
    logits_ptr,  # (rows, classes)
    teacher_ptr,  # (rows, classes)
    labels_ptr,  # (rows,)
    losses_ptr,  # float32, (rows,), written
    gradients_ptr,  # (rows, classes), written
    rows,
    alpha,
    temperature,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least CLASSES
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < rows
    row_R = tl.minimum(row_R, rows - 1)  # beyond the last row: the last once more, and nothing written
    class_K = tl.arange(0, BLOCK)
    valid_1K = (class_K < CLASSES)[None, :]
    hit_RK = class_K[None, :] == tl.load(labels_ptr + row_R)[:, None]
    offsets_RK = row_R.to(tl.int64)[:, None] * CLASSES + class_K[None, :]
    s_RK, t_RK = _load(logits_ptr, teacher_ptr, offsets_RK, valid_1K)
    s_max_R = tl.max(s_RK, axis=1)
    t_max_R = tl.max(t_RK, axis=1)
    hard_R, soft_R, teacher_R = _sums(s_RK, t_RK, s_max_R, t_max_R, temperature)
    losses_R = _finish(
        gradients_ptr, s_RK, t_RK, offsets_RK, valid_1K, hit_RK, inside_R,
        s_max_R, t_max_R, hard_R, soft_R, teacher_R, alpha, temperature,
    )  # fmt: skip
    tl.store(losses_ptr + row_R, losses_R, mask=inside_R)


@triton.jit
def _blocks_kernel(
    logits_ptr,  # (rows, classes)
    teacher_ptr,  # (rows, classes)
    labels_ptr,  # (rows,)
    losses_ptr,  # float32, (rows,), written
    gradients_ptr,  # (rows, classes), written
    alpha,
    temperature,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R = tl.program_id(0) + tl.arange(0, 1)
    class_K = tl.arange(0, BLOCK)
    label_R = tl.load(labels_ptr + row_R)
    start_R1 = row_R.to(tl.int64)[:, None] * CLASSES
    s_max_R = tl.full((1,), float("-inf"), tl.float32)
    t_max_R = tl.full((1,), float("-inf"), tl.float32)
    hard_R = tl.zeros((1,), tl.float32)
    soft_R = tl.zeros((1,), tl.float32)
    teacher_R = tl.zeros((1,), tl.float32)
    for block in range(0, CLASSES, BLOCK):
        valid_1K = (block + class_K < CLASSES)[None, :]
        s_RK, t_RK = _load(logits_ptr, teacher_ptr, start_R1 + block + class_K[None, :], valid_1K)
        s_new_R = tl.maximum(s_max_R, tl.max(s_RK, axis=1))
        t_new_R = tl.maximum(t_max_R, tl.max(t_RK, axis=1))
        more_hard_R, more_soft_R, more_teacher_R = _sums(s_RK, t_RK, s_new_R, t_new_R, temperature)
        # Online softmax (Milakov and Gimelshein, 2018): the sums so far are brought to the new maximum.
        hard_R = hard_R * tl.exp(s_max_R - s_new_R) + more_hard_R
        soft_R = soft_R * tl.exp((s_max_R - s_new_R) / temperature) + more_soft_R
        teacher_R = teacher_R * tl.exp((t_max_R - t_new_R) / temperature) + more_teacher_R
        s_max_R = s_new_R
        t_max_R = t_new_R
    losses_R = tl.zeros((1,), tl.float32)
    for block in range(0, CLASSES, BLOCK):
        valid_1K = (block + class_K < CLASSES)[None, :]
        offsets_RK = start_R1 + block + class_K[None, :]
        hit_RK = (block + class_K)[None, :] == label_R[:, None]
        s_RK, t_RK = _load(logits_ptr, teacher_ptr, offsets_RK, valid_1K)
        losses_R += _finish(
            gradients_ptr, s_RK, t_RK, offsets_RK, valid_1K, hit_RK, row_R >= 0,
            s_max_R, t_max_R, hard_R, soft_R, teacher_R, alpha, temperature,
        )  # fmt: skip
    tl.store(losses_ptr + row_R, losses_R)


@torch.library.custom_op("litdeploy::distillation_loss", mutates_args=())
def distillation_loss_op(
    logits_NK: Tensor, teacher_logits_NK: Tensor, labels_N: Tensor, alpha: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """The loss, and for the backward pass the gradient of the sum over the batch, in the logits' type.

    Not of the mean: dividing at the end, with the upstream gradient, keeps small numbers out of float16.

    Args:
        logits_NK, teacher_logits_NK, labels_N, alpha, temperature: see `reference.distillation_loss`.

    Returns:
        float32 scalar, and contiguous (N, K).
    """
    logits_NK, teacher_logits_NK = logits_NK.contiguous(), teacher_logits_NK.contiguous()
    rows, classes = logits_NK.shape
    losses_N = torch.empty(rows, dtype=torch.float32, device=logits_NK.device)
    gradients_NK = torch.empty_like(logits_NK)
    arguments = (logits_NK, teacher_logits_NK, labels_N.contiguous(), losses_N, gradients_NK)
    with torch.cuda.device_of(logits_NK):
        if classes > MOST_CLASSES:
            _blocks_kernel[(rows,)](*arguments, alpha, temperature, CLASSES=classes, BLOCK=BLOCK, **OPTIONS)
        else:
            width = triton.next_power_of_2(classes)
            height = max(1, TILE // width)
            programs = (triton.cdiv(rows, height),)
            _rows_kernel[programs](
                *arguments, rows, alpha, temperature, CLASSES=classes, ROWS=height, BLOCK=width, **OPTIONS
            )
    return losses_N.mean(), gradients_NK


@distillation_loss_op.register_fake
def _(
    logits_NK: Tensor, teacher_logits_NK: Tensor, labels_N: Tensor, alpha: float, temperature: float
) -> tuple[Tensor, Tensor]:
    gradients_NK = torch.empty_like(logits_NK, memory_format=torch.contiguous_format)
    return logits_NK.new_empty((), dtype=torch.float32), gradients_NK


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, None, None, None, None]:
    (gradients_NK,) = ctx.saved_tensors
    if upstream is None:
        return None, None, None, None, None
    (gradient_NK,) = scaled([gradients_NK], upstream.reshape(1), [len(gradients_NK)])
    return gradient_NK, None, None, None, None


distillation_loss_op.register_autograd(_backward, setup_context=_keep)


def distillation_loss(
    logits_NK: Tensor, teacher_logits_NK: Tensor, labels_N: Tensor, alpha: float, temperature: float
) -> Tensor:
    """`reference.distillation_loss` by Triton: logits in float32, float16 or bfloat16, any number of classes.

    Labels are not checked: one outside 0 … K − 1 counts as no hard loss.
    """
    loss: Tensor = distillation_loss_op(logits_NK, teacher_logits_NK.detach(), labels_N, alpha, temperature)[0]
    return loss
