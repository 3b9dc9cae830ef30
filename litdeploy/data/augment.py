"""From stored pixels to a network's input, on the device where the pixels are.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.recipe import Augmentation
from litdeploy.spec import InputSpec


def augment(images_NCHW: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Crops and flips each image at random, each by its own draw.

    The padding is of black pixels, before normalisation, as torchvision's `RandomCrop(size, padding)` ahead of
    `ToTensor` does it (and the LIT paper's CIFAR runs).

    Args:
        images_NCHW: uint8, on any device; not changed.
        generator: on the CPU or on the images' device; the same draws give the same crops on every device.

    Returns:
        uint8 of the same shape, on the same device.
    """
    padding = augmentation.padding
    if padding == 0 and not augmentation.flip:
        return images_NCHW
    device = images_NCHW.device
    n, _, height, width = images_NCHW.shape

    def draw(high: int) -> Tensor:
        drawn = torch.randint(high, (n, 1), generator=generator, device=generator.device)
        return drawn.to(device, non_blocking=True)

    rows_NH = torch.arange(height, device=device).expand(n, height)
    columns_NW = torch.arange(width, device=device).expand(n, width)
    if augmentation.flip:
        columns_NW = torch.where(draw(2).bool(), columns_NW.flip(1), columns_NW)
    if padding:
        images_NCHW = F.pad(images_NCHW, (padding,) * 4)
        rows_NH = rows_NH + draw(2 * padding + 1)
        columns_NW = columns_NW + draw(2 * padding + 1)
    each = torch.arange(n, device=device)[:, None, None]
    cut_NHWC = images_NCHW.permute(0, 2, 3, 1)[each, rows_NH[:, :, None], columns_NW[:, None, :]]
    return cut_NHWC.permute(0, 3, 1, 2)


def normalise(images_NCHW: Tensor, spec: InputSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """(value / 255 − mean) / std per channel.

    Args:
        images_NCHW: uint8, on any device.
        dtype: of the result; the arithmetic is float32 whatever it is.

    Returns:
        The same shape and device, in channels-last memory format.
    """
    mean, std = _statistics(spec.mean, spec.std, images_NCHW.device)
    values = images_NCHW.to(torch.float32, memory_format=torch.channels_last)
    return values.sub_(mean).div_(std).to(dtype)


# Kept on the device: a copy from the host at each batch would wait for it, and cannot be captured in a CUDA graph.
@lru_cache(maxsize=16)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        mean_C11, std_C11 = (255 * torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        return mean_C11.to(device), std_C11.to(device)
