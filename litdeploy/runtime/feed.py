"""What an exported file takes, and how a batch of a runner's becomes that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor

from litdeploy.errors import RunnerError
from litdeploy.files import parse_json
from litdeploy.networks.batch import Batch, mapped

_NUMBERS = TypeAdapter(list[float], config=ConfigDict(strict=True, allow_inf_nan=False))
_NAMES = TypeAdapter(list[str], config=ConfigDict(strict=True))
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
        channels = tensor.shape[1]
        if not len(self.mean) == len(self.std) == channels:
            raise RunnerError(
                f"the file takes pixels and says how {len(self.mean)} channels are normalised, and not {channels}. "
                "Make it again: litdeploy export --embed-preprocessing"
            )
        mean_C11, std_C11 = (_of_pixels(values, tensor.device) for values in (self.mean, self.std))
        pixels_NCHW = (tensor * std_C11 + mean_C11).round_().clamp_(0, 255).to(torch.uint8)
        return pixels_NCHW.permute(0, 2, 3, 1).contiguous()


# Kept on the device: a copy from the host at each batch would wait for it.
@lru_cache(maxsize=16)
def _of_pixels(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return 255 * torch.tensor(values, device=device).view(-1, 1, 1)


def read_feed(metadata: Mapping[str, str], source: str = "the exported file") -> Feed:
    """What the metadata of a file that `litdeploy export` wrote say of its input; of another's: plain float32.

    Args:
        source: what a message calls the file.

    Raises:
        RunnerError: the metadata are damaged.
    """
    embedded = metadata.get("preprocessing") == "embedded"
    return Feed(
        precision=metadata.get("precision", "fp32"),
        dtype=torch.uint8 if embedded else IO_DTYPES.get(metadata.get("io_precision", "fp32"), torch.float32),
        mean=read_numbers(metadata, "mean", source),
        std=read_numbers(metadata, "std", source),
    )


def read_numbers(metadata: Mapping[str, str], key: str, source: str) -> tuple[float, ...]:
    """A list of numbers in the metadata of an exported file; empty where there is none.

    Raises:
        RunnerError: it is something else.
    """
    try:
        return tuple(_NUMBERS.validate_python(parse_json(metadata.get(key, "[]"))))
    except ValueError:
        raise RunnerError(
            f"{source}: what its metadata say under '{key}' is no list of numbers. It is damaged or another's; make it "
            "again: litdeploy export"
        ) from None


def read_names(metadata: Mapping[str, str], source: str) -> tuple[str, ...]:
    """The names of the classes in the metadata of an exported file; empty where there are none.

    Raises:
        RunnerError: they are no names.
    """
    try:
        return tuple(_NAMES.validate_python(parse_json(metadata.get("classes", "[]"))))
    except ValueError:
        raise RunnerError(
            f"{source}: what its metadata say under 'classes' is no list of names. It is damaged or another's; make it "
            "again: litdeploy export"
        ) from None
