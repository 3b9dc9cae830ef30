"""The definition of each fused kernel in plain torch: for every device, and for machines without Triton.

Shape suffixes: N images of a batch, M images of the source, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.config.spec import InputSpec
from litdeploy.data import Crops, augment, normalise
from litdeploy.tasks import TASKS


def section_losses(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """mse(S_i(T_{i−1}), T_i) of every section: the mean over its elements, in float32 (LIT, section 3.1).

    Args:
        students, teachers: one a section, of the same shape; the teachers' carry no gradient.

    Returns:
        float32, (sections,).
    """
    pairs = zip(students, teachers, strict=True)
    return torch.stack([F.mse_loss(student.float(), teacher.detach().float()) for student, teacher in pairs])


def distillation_loss(
    logits_NK: Tensor, teacher_logits_NK: Tensor, labels_N: Tensor, alpha: float, temperature: float
) -> Tensor:
    """L_KD of logits: see `Task.loss`."""
    return TASKS["classification"].loss(logits_NK, teacher_logits_NK, labels_N, alpha, temperature)


def augmented(
    source_MCHW: Tensor, rows_N: Tensor, crops: Crops, spec: InputSpec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A batch from its source: gathered, padded with black, cropped, flipped, normalized.

    Args:
        source_MCHW: uint8.
        rows_N: int64, which of the source's images.
        dtype: of the result; the arithmetic is float32 in any case.

    Returns:
        (N, C, H, W) in channels-last memory format, on the source's device.
    """
    return normalise(augment(source_MCHW.index_select(0, rows_N), crops), spec, dtype)
