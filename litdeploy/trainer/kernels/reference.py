"""What is right: each fused kernel's meaning in plain torch, for every device, and what runs where there is no Triton.

Shape suffixes: N images in the batch, M images in the dataset, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.recipe import Augmentation
from litdeploy.spec import InputSpec


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
    """L_KD = α · CE(S, y) + (1 − α) · τ² · KL(softmax(T/τ) ‖ softmax(S/τ)), mean over the batch (Hinton et al., 2015).

    Args:
        logits_NK, teacher_logits_NK: float32.
        alpha: weight of the hard labels.
        temperature: τ.
    """
    hard = F.cross_entropy(logits_NK, labels_N)
    soft = F.kl_div(
        F.log_softmax(logits_NK / temperature, dim=-1),
        F.log_softmax(teacher_logits_NK / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return alpha * hard + (1 - alpha) * temperature**2 * soft


class Draws(NamedTuple):
    """How each image of a batch is cut.

    Attributes:
        rows_N, columns_N: int64, the cut's offset into the padded image, 0 to twice the padding.
        flips_N: bool, left and right exchanged.
    """

    rows_N: Tensor
    columns_N: Tensor
    flips_N: Tensor


class PixelScale(NamedTuple):
    """An input's normalisation on the scale of stored pixels, 0 to 255.

    Attributes:
        mean_C, std_C: float32, on the images' device.
    """

    mean_C: Tensor
    std_C: Tensor


def draw(n: int, augmentation: Augmentation, generator: torch.Generator, device: torch.device) -> Draws:
    """Draws for `n` images: from the same generator the same as `litdeploy.data.augment` makes.

    Args:
        generator: on the CPU or on `device`.
    """

    def one(high: int) -> Tensor:
        # (n, 1) as there: on a GPU another shape may mean other numbers.
        drawn = torch.randint(high, (n, 1), generator=generator, device=generator.device)
        return drawn.to(device, non_blocking=True).squeeze(1)

    nothing = torch.zeros(n, dtype=torch.int64, device=device)
    flips = one(2) if augmentation.flip else nothing
    if not augmentation.padding:
        return Draws(nothing, nothing, flips.bool())
    reach = 2 * augmentation.padding + 1
    return Draws(one(reach), one(reach), flips.bool())


def pixel_scale(spec: InputSpec, device: torch.device) -> PixelScale:
    """A spec's normalisation, to be made once a run: a copy from the host cannot be captured in a CUDA graph."""
    mean, std = (255 * torch.tensor(values, dtype=torch.float32) for values in (spec.mean, spec.std))
    return PixelScale(mean.to(device), std.to(device))


def augmented(
    images_MCHW: Tensor,
    indices_N: Tensor,
    draws: Draws,
    scale: PixelScale,
    padding: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gathers, pads with black, cuts, flips and normalises: `normalise(augment(images[indices]))` for given draws.

    Args:
        images_MCHW: uint8, the whole dataset.
        indices_N: int64, which images.
        padding: pixels on each side, as the draws were made for.
        dtype: of the result; the arithmetic is float32 whatever it is.

    Returns:
        (N, C, H, W) in channels-last memory format, on the images' device.
    """
    height, width = images_MCHW.shape[2:]
    rows_H = torch.arange(height, device=images_MCHW.device)
    columns_W = torch.arange(width, device=images_MCHW.device)
    columns_NW = torch.where(draws.flips_N[:, None], columns_W.flip(0), columns_W) + draws.columns_N[:, None]
    rows_NH = rows_H + draws.rows_N[:, None]
    padded_NHWC = F.pad(images_MCHW[indices_N], (padding,) * 4).permute(0, 2, 3, 1)
    each = torch.arange(len(indices_N), device=images_MCHW.device)[:, None, None]
    cut_NHWC = padded_NHWC[each, rows_NH[:, :, None], columns_NW[:, None, :]]
    values_NHWC = (cut_NHWC.float() - scale.mean_C) / scale.std_C
    return values_NHWC.to(dtype).contiguous().permute(0, 3, 1, 2)
