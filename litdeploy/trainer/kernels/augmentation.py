"""The next batch in one pass: gathered from the resident dataset, cut, flipped, normalised, cast, channels-last."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from litdeploy.trainer.kernels.reference import Draws, PixelScale
from litdeploy.trainer.kernels.scaling import OPTIONS

BLOCK = 2048


@triton.jit
def _augment_kernel(
    images_ptr,  # uint8, (M, C, H, W)
    indices_ptr,  # (N,)
    rows_ptr,  # (N,)
    columns_ptr,  # (N,)
    flips_ptr,  # (N,)
    mean_ptr,  # float32, (C,)
    std_ptr,  # float32, (C,)
    batch_ptr,  # (N, H, W, C) in the order of memory, written
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Over what is written, so that the stores are the wide ones; the bytes read for them lie in the cache.
    size: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    image = tl.program_id(1)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    channel = offsets % CHANNELS
    column = (offsets // CHANNELS) % WIDTH
    row = offsets // (CHANNELS * WIDTH)
    column = tl.where(tl.load(flips_ptr + image) != 0, WIDTH - 1 - column, column)
    column += (tl.load(columns_ptr + image) - PADDING).to(tl.int32)
    row += (tl.load(rows_ptr + image) - PADDING).to(tl.int32)
    black = (row < 0) | (row >= HEIGHT) | (column < 0) | (column >= WIDTH)
    source = tl.load(indices_ptr + image).to(tl.int64) * size + (channel * HEIGHT + row) * WIDTH + column
    value = tl.load(images_ptr + source, mask=mask & ~black, other=0).to(tl.float32)
    mean = tl.load(mean_ptr + channel)
    std = tl.load(std_ptr + channel)
    # Rounded as torch rounds it; the plain division is a bit off.
    value = tl.div_rn(value - mean, std)
    tl.store(batch_ptr + image.to(tl.int64) * size + offsets, value.to(batch_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("litdeploy::augmented", mutates_args=())
def augmented_op(
    images_MCHW: Tensor,
    indices_N: Tensor,
    rows_N: Tensor,
    columns_N: Tensor,
    flips_N: Tensor,
    mean_C: Tensor,
    std_C: Tensor,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `augmented`."""
    images_MCHW = images_MCHW.contiguous()
    _, channels, height, width = images_MCHW.shape
    batch_NHWC = torch.empty(len(indices_N), height, width, channels, dtype=dtype, device=images_MCHW.device)
    programs = (triton.cdiv(channels * height * width, BLOCK), len(indices_N))
    with torch.cuda.device_of(images_MCHW):
        _augment_kernel[programs](
            images_MCHW,
            *(tensor.contiguous() for tensor in (indices_N, rows_N, columns_N, flips_N, mean_C, std_C)),
            batch_NHWC,
            CHANNELS=channels,
            HEIGHT=height,
            WIDTH=width,
            PADDING=padding,
            BLOCK=BLOCK,
            **OPTIONS,
        )
    return batch_NHWC.permute(0, 3, 1, 2)


@augmented_op.register_fake
def _(
    images_MCHW: Tensor,
    indices_N: Tensor,
    rows_N: Tensor,
    columns_N: Tensor,
    flips_N: Tensor,
    mean_C: Tensor,
    std_C: Tensor,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    _, channels, height, width = images_MCHW.shape
    return images_MCHW.new_empty(len(indices_N), height, width, channels, dtype=dtype).permute(0, 3, 1, 2)


def augmented(
    images_MCHW: Tensor,
    indices_N: Tensor,
    draws: Draws,
    scale: PixelScale,
    padding: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`reference.augmented` by Triton, the same to the last bit.

    Indices are not checked. The dataset is read where it lies if it is contiguous, and copied whole if it is not.
    """
    batch_NCHW: Tensor = augmented_op(images_MCHW, indices_N, *draws, *scale, padding, dtype)
    return batch_NCHW
