"""The trainer's computations outside the networks, each fused into one Triton kernel.

| function | one pass over | instead of |
|---|---|---|
| `section_losses` | all S_i and T_i, in one launch | a section: cast, subtract, square, sum, and the way back |
| `distillation_loss` | both logits | three softmaxes, their logarithms, and the way back |
| `augmented` | the pixels of the batch | gather, pad, crop, flip, cast, subtract, divide, cast |

`reference.py` defines each of them in plain torch; each kernel has a file of its own. This module chooses which of the
two runs: the kernel on a CUDA device where Triton works, the reference everywhere else.

The kernels are torch operators (`torch.ops.litdeploy`): `torch.compile` keeps them in its graph, autograd knows their
gradients, and a CUDA graph captures them, since their arguments are addresses and numbers only. The first call compiles
and must come before a capture.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from litdeploy.config.spec import InputSpec
from litdeploy.data import Crops
from litdeploy.trainer.kernels import reference

__all__ = ["augmented", "distillation_loss", "fused_on", "section_losses"]

# Found without importing it, which takes half a second that a run on the CPU does not need.
_HAS_TRITON = find_spec("triton") is not None


def section_losses(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """mse(S_i(T_{i−1}), T_i) of every section: see `reference.section_losses`."""
    if fused_on(students[0].device):
        from litdeploy.trainer.kernels import section_loss

        return section_loss.section_losses(students, teachers)
    return reference.section_losses(students, teachers)


def distillation_loss(
    logits_NK: Tensor, teacher_logits_NK: Tensor, labels_N: Tensor, alpha: float, temperature: float
) -> Tensor:
    """L_KD: see `reference.distillation_loss`."""
    if fused_on(logits_NK.device):
        from litdeploy.trainer.kernels import distillation

        return distillation.distillation_loss(logits_NK, teacher_logits_NK, labels_N, alpha, temperature)
    return reference.distillation_loss(logits_NK, teacher_logits_NK, labels_N, alpha, temperature)


def augmented(
    source_MCHW: Tensor, rows_N: Tensor, crops: Crops, spec: InputSpec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A batch, cropped, flipped and normalized: see `reference.augmented`."""
    if fused_on(source_MCHW.device):
        from litdeploy.trainer.kernels import augmentation

        return augmentation.augmented(source_MCHW, rows_N, crops, spec, dtype)
    return reference.augmented(source_MCHW, rows_N, crops, spec, dtype)


def fused_on(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device. What `torch.compile` compiles for CUDA needs a working Triton."""
    return device.type == "cuda" and _HAS_TRITON and (torch.compiler.is_compiling() or _works_on(device))


@lru_cache
def _works_on(device: torch.device) -> bool:
    """Whether a kernel can be built and launched, tried once per device.

    Triton builds its launcher with a C compiler and Python's headers, which not every machine with a GPU has.
    """
    try:
        from litdeploy.trainer.kernels.scaling import scaled

        some = torch.ones(16, device=device)
        scaled([some], some[:1], [1])
    except Exception as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        warnings.warn(
            f"the fused kernels cannot run on {device}, and their slower references do: {why}",
            stacklevel=3,
        )
        return False
    return True
