"""The backward pass that the fused losses share: the gradient that was kept, times the upstream gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 elements a thread: several 16-byte loads are under way at once.
BLOCK = 4096
# Triton's versions differ in whether they fuse a product with a sum; the reference does not.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _scale_kernel(
    kept,  # tuple of pointers, one a tensor: (size,)
    scaled,  # likewise
    sizes,  # tuple of integers: elements of each tensor
    upstream_ptr,  # float32, (tensors,)
    divisors,  # tuple of integers, one a tensor
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    first = 0
    for i in tl.static_range(len(kept)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (program >= first) & (program < first + blocks):
            offsets = (program - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offsets < sizes[i]
            factor = tl.load(upstream_ptr + i) / divisors[i]
            values = tl.load(kept[i] + offsets, mask=mask, other=0.0).to(tl.float32) * factor
            tl.store(scaled[i] + offsets, values.to(scaled[i].dtype.element_ty), mask=mask)
        first += blocks


@torch.library.custom_op("litdeploy::scaled", mutates_args=())
def scaled(kept: Sequence[Tensor], upstream: Tensor, divisors: Sequence[int]) -> list[Tensor]:
    """kept_i · upstream_i / divisor_i for several tensors in one launch; float32 arithmetic, rounded once.

    Args:
        kept: each dense in memory, in whatever order of its dimensions.
        upstream: float32, (tensors,).

    Returns:
        Tensors of the kept ones' shapes, types and strides.
    """
    results = [torch.empty_like(tensor) for tensor in kept]
    sizes = [tensor.numel() for tensor in kept]
    programs = sum(triton.cdiv(size, BLOCK) for size in sizes)
    with torch.cuda.device_of(upstream):
        _scale_kernel[(programs,)](
            tuple(kept),
            tuple(results),
            tuple(sizes),
            upstream.contiguous(),
            tuple(divisors),
            BLOCK=BLOCK,
            **OPTIONS,
        )
    return results


@scaled.register_fake
def _(kept: Sequence[Tensor], upstream: Tensor, divisors: Sequence[int]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in kept]
