"""What an exported file takes, and how a batch of a runner's becomes that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from litdeploy.batch import Batch, mapped

IO_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Feed:
    """The input of an exported file.

    Attributes:
        precision: of its arithmetic.
        dtype: of its input, where that is of floating point; uint8 where the normalisation is inside the file, which
            then takes (N, H, W, C).
        mean, std: one value a channel, on the scale 0–1; empty where the file does not tell.
    """

    precision: str = "fp32"
    dtype: torch.dtype = torch.float32
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def take(self, batch: Batch) -> Batch:
        """What the file takes in place of a batch of a runner's, float32 where it is of floating point; contiguous."""
        return mapped(self._taken, batch)

    def _taken(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if self.dtype is not torch.uint8 or not tensor.is_floating_point():
            # A batch of one channel in channels-last format counts as contiguous, with other strides than were compiled
            # for; AOTInductor does not look at them, and computes something else (seen with torch 2.13 on a CPU).
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.to(dtype).contiguous().flatten().view(tensor.shape)
        mean_C11, std_C11 = (_of_pixels(values, tensor.device) for values in (self.mean, self.std))
        pixels_NCHW = (tensor * std_C11 + mean_C11).round_().clamp_(0, 255).to(torch.uint8)
        return pixels_NCHW.permute(0, 2, 3, 1).contiguous()


# Kept on the device: a copy from the host at each batch would wait for it.
@lru_cache(maxsize=16)
def _of_pixels(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return 255 * torch.tensor(values, device=device).view(-1, 1, 1)


def read_feed(metadata: Mapping[str, str]) -> Feed:
    """What the metadata of a file that `litdeploy export` wrote say of its input; of another's: plain float32."""
    embedded = metadata.get("preprocessing") == "embedded"
    return Feed(
        precision=metadata.get("precision", "fp32"),
        dtype=torch.uint8 if embedded else IO_DTYPES.get(metadata.get("io_precision", "fp32"), torch.float32),
        mean=tuple(json.loads(metadata.get("mean", "[]"))),
        std=tuple(json.loads(metadata.get("std", "[]"))),
    )
