"""The next batch in one pass: gathered from the resident dataset, cropped, flipped, normalized, cast, channels-last."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from litdeploy.config.spec import InputSpec
from litdeploy.data import Crops, pixel_scale
from litdeploy.trainer.kernels.scaling import OPTIONS

BLOCK = 2048


@triton.jit
def _augment_kernel(
    source_ptr,  # uint8, (M, C, H, W)
    rows_ptr,  # int64, (N,)
    tops_ptr,  # int64, (N,)
    lefts_ptr,  # int64, (N,)
    flips_ptr,  # bool, (N,)
    mean_ptr,  # float32, (C,)
    std_ptr,  # float32, (C,)
    batch_ptr,  # (N, H, W, C) in the order of memory, written
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Indexed by the output, so that the stores are the wide ones; the bytes they read are in the cache.
    size: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    image = tl.program_id(1)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    channel = offsets % CHANNELS
    column = (offsets // CHANNELS) % WIDTH
    row = offsets // (CHANNELS * WIDTH)
    column = tl.where(tl.load(flips_ptr + image) != 0, WIDTH - 1 - column, column)
    column += (tl.load(lefts_ptr + image) - PADDING).to(tl.int32)
    row += (tl.load(tops_ptr + image) - PADDING).to(tl.int32)
    black = (row < 0) | (row >= HEIGHT) | (column < 0) | (column >= WIDTH)
    pixel = tl.load(rows_ptr + image) * size + (channel * HEIGHT + row) * WIDTH + column
    value = tl.load(source_ptr + pixel, mask=mask & ~black, other=0).to(tl.float32)
    mean = tl.load(mean_ptr + channel)
    std = tl.load(std_ptr + channel)
    # Rounded as torch rounds it; the plain division is a bit off.
    value = tl.div_rn(value - mean, std)
    tl.store(batch_ptr + image.to(tl.int64) * size + offsets, value.to(batch_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("litdeploy::augmented", mutates_args=())
def augmented_op(
    source_MCHW: Tensor,
    rows_N: Tensor,
    tops_N: Tensor,
    lefts_N: Tensor,
    flips_N: Tensor,
    mean_C11: Tensor,
    std_C11: Tensor,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `augmented`."""
    source_MCHW = source_MCHW.contiguous()
    _, channels, height, width = source_MCHW.shape
    batch_NHWC = torch.empty(len(rows_N), height, width, channels, dtype=dtype, device=source_MCHW.device)
    programs = (triton.cdiv(channels * height * width, BLOCK), len(rows_N))
    with torch.cuda.device_of(source_MCHW):
        _augment_kernel[programs](
            source_MCHW,
            *(tensor.contiguous() for tensor in (rows_N, tops_N, lefts_N, flips_N, mean_C11, std_C11)),
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
    source_MCHW: Tensor,
    rows_N: Tensor,
    tops_N: Tensor,
    lefts_N: Tensor,
    flips_N: Tensor,
    mean_C11: Tensor,
    std_C11: Tensor,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    _, channels, height, width = source_MCHW.shape
    return source_MCHW.new_empty(len(rows_N), height, width, channels, dtype=dtype).permute(0, 3, 1, 2)


def augmented(
    source_MCHW: Tensor, rows_N: Tensor, crops: Crops, spec: InputSpec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`reference.augmented` by Triton, with the same roundings.

    Rows are not checked. The source is read in place if it is contiguous, else copied whole.
    """
    mean_C11, std_C11 = pixel_scale(spec, source_MCHW.device)
    batch_NCHW: Tensor = augmented_op(
        source_MCHW, rows_N, crops.tops_N, crops.lefts_N, crops.flips_N, mean_C11, std_C11, crops.padding, dtype
    )
    return batch_NCHW
