"""What the block trainer computes beside the networks, each fused into one Triton kernel.

| function | one pass over | instead of |
|---|---|---|
| `section_losses` | every section's S_i and T_i, in one launch | cast, subtract, square, sum, and the way back, a section |
| `distillation_loss` | both logits | three softmaxes, their logarithms, and the way back |
| `augmented` | the pixels of the batch | gather, pad, cut, flip, cast, subtract, divide, cast |

`reference.py` says in plain torch what each of them means; one file a kernel beside it. Which of the two runs is
chosen here: the kernel on a CUDA device where Triton can be imported, the reference everywhere else. `draw` and
`pixel_scale` make what `augmented` takes.

The kernels are torch operators (`torch.ops.litdeploy`): `torch.compile` keeps them in its graph, autograd knows their
gradients, and a CUDA graph captures them, since all that they take are addresses and numbers. The first call compiles
and must come before a capture. A step that is captured has to find each batch's indices and draws at the same address.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from litdeploy.trainer.kernels import reference
from litdeploy.trainer.kernels.reference import Draws, PixelScale, draw, pixel_scale

__all__ = ["Draws", "PixelScale", "augmented", "distillation_loss", "draw", "pixel_scale", "section_losses"]

# Looked for and not imported: that takes half a second, which a run on the CPU has no use for.
HAS_TRITON = find_spec("triton") is not None
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def is_fused(*tensors: Tensor) -> bool:
    """Whether the Triton kernels take these tensors."""
    return HAS_TRITON and all(tensor.is_cuda and tensor.dtype in FLOATS for tensor in tensors)


def section_losses(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """mse(S_i(T_{i−1}), T_i) of every section: see `reference.section_losses`."""
    if is_fused(*students, *teachers):
        from litdeploy.trainer.kernels import section_loss

        return section_loss.section_losses(students, teachers)
    return reference.section_losses(students, teachers)


def distillation_loss(
    logits_NK: Tensor, teacher_logits_NK: Tensor, labels_N: Tensor, alpha: float, temperature: float
) -> Tensor:
    """L_KD: see `reference.distillation_loss`. The teacher's logits get no gradient."""
    if is_fused(logits_NK, teacher_logits_NK):
        from litdeploy.trainer.kernels import distillation

        return distillation.distillation_loss(logits_NK, teacher_logits_NK, labels_N, alpha, temperature)
    return reference.distillation_loss(logits_NK, teacher_logits_NK.detach(), labels_N, alpha, temperature)


def augmented(
    images_MCHW: Tensor,
    indices_N: Tensor,
    draws: Draws,
    scale: PixelScale,
    padding: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The next batch, cut, flipped and normalised: see `reference.augmented`."""
    if is_fused(*scale):
        from litdeploy.trainer.kernels import augmentation

        return augmentation.augmented(images_MCHW, indices_N, draws, scale, padding, dtype)
    return reference.augmented(images_MCHW, indices_N, draws, scale, padding, dtype)
