"""From what is stored (pixels, characters or tokens) to a network's input, on its device.

Shape suffixes: N images or texts, C channels, H height, W width, L characters or tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.batch import Batch
from litdeploy.config.recipe import Augmentation
from litdeploy.config.spec import AnyInput, CharacterInput, InputSpec, TensorInput, TokenInput
from litdeploy.tasks import task_of

# Stored for a character that is not ASCII.
FOREIGN = 127


@dataclass(frozen=True)
class Crops:
    """Crops and flips of a batch of images. On the images' device.

    Attributes:
        tops_N, lefts_N: int64, 0 to 2 · padding: corner of the crop in the padded image.
        flips_N: bool: whether the crop is mirrored left to right.
        padding: pixels of black on each side, before the crop.
    """

    tops_N: Tensor
    lefts_N: Tensor
    flips_N: Tensor
    padding: int

    def to(self, device: torch.device) -> Crops:
        """The same on another device."""
        return self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Crops:
        """The same with a function applied to each tensor."""
        return replace(
            self, tops_N=function(self.tops_N), lefts_N=function(self.lefts_N), flips_N=function(self.flips_N)
        )


def draw_crops(count: int, augmentation: Augmentation, generator: torch.Generator) -> Crops:
    """Draw each image's crop and flip; no random numbers are used for what the augmentation leaves out.

    Args:
        augmentation: `filled`.
        generator: on the CPU, so that crops are the same on every device.
    """
    padding = augmentation.padding or 0
    still = torch.zeros(count, dtype=torch.int64)
    flips_N = torch.randint(2, (count,), generator=generator).bool() if augmentation.flip else still.bool()
    if not padding:
        return Crops(still, still, flips_N, padding)
    tops_N, lefts_N = (torch.randint(2 * padding + 1, (count,), generator=generator) for _ in range(2))
    return Crops(tops_N, lefts_N, flips_N, padding)


def augment(images_NCHW: Tensor, crops: Crops) -> Tensor:
    """Pad, crop and flip each image.

    The padding is of black pixels, before normalization, as torchvision's `RandomCrop(size, padding)` ahead of
    `ToTensor` does (and the LIT paper on CIFAR).

    Args:
        images_NCHW: uint8, on any device; not changed.

    Returns:
        uint8 of the same shape, on the same device.
    """
    device = images_NCHW.device
    n, _, height, width = images_NCHW.shape
    padded_NCHW = F.pad(images_NCHW, (crops.padding,) * 4)
    columns_W = torch.arange(width, device=device)
    columns_NW = torch.where(crops.flips_N[:, None], columns_W.flip(0), columns_W) + crops.lefts_N[:, None]
    rows_NH = torch.arange(height, device=device) + crops.tops_N[:, None]
    each = torch.arange(n, device=device)[:, None, None]
    cut_NHWC = padded_NCHW.permute(0, 2, 3, 1)[each, rows_NH[:, :, None], columns_NW[:, None, :]]
    return cut_NHWC.permute(0, 3, 1, 2)


def prepared(stored: Batch, spec: AnyInput, labels: Tensor | None = None, first: int = 0) -> Batch:
    """A batch as the network takes it, from what is stored.

    Args:
        stored: on any device, uint8: images (N, C, H, W), or texts of one byte a character (N, L), 0 after their ends;
            or token ids (N, L), int16 or int32, negative after their ends. Float32, int64 and several tensors are what
            the network takes already.
        labels: of the batch; some tasks need them, see `Task.inputs`.
        first: position of the first sample in its split.
    """
    if isinstance(stored, dict) or isinstance(spec, TensorInput) or stored.dtype in (torch.float32, torch.int64):
        return stored
    if isinstance(spec, CharacterInput):
        return _character_ids(spec, stored.device)[stored.long()]
    if isinstance(spec, TokenInput):
        there_NL = stored >= 0
        return {"input_ids": stored.long().where(there_NL, spec.pad), "attention_mask": there_NL.long()}
    return task_of(spec).inputs(normalise(stored, spec.images), labels, spec, first)


@lru_cache(maxsize=16)
def _character_ids(spec: CharacterInput, device: torch.device) -> Tensor:
    """int64 (256): the id of each byte, see `CharacterInput`; read-only."""
    places = {character: place for place, character in enumerate(spec.alphabet, start=2)}
    ids = [places.get(chr(byte), places.get(chr(byte).lower(), 1)) for byte in range(FOREIGN)]
    with torch.inference_mode(False):
        return torch.tensor([0, *ids[1:], *[1] * (256 - FOREIGN)]).to(device)


def normalise(images_NCHW: Tensor, spec: InputSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """(value / 255 − mean) / std per channel.

    Args:
        images_NCHW: uint8, on any device.
        dtype: of the result; the arithmetic is float32.

    Returns:
        The same shape and device, in channels-last memory format.
    """
    return standardise(images_NCHW, *pixel_scale(spec, images_NCHW.device), dtype)


def standardise(images_NCHW: Tensor, mean_C11: Tensor, std_C11: Tensor, dtype: torch.dtype) -> Tensor:
    """`normalise` with the tensors of `pixel_scale`."""
    values = images_NCHW.to(torch.float32, memory_format=torch.channels_last)
    return values.sub_(mean_C11).div_(std_C11).to(dtype)


# Kept on the device: a copy from the host at each batch would synchronize, and cannot be captured in a CUDA graph.
@lru_cache(maxsize=16)
def pixel_scale(spec: InputSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel on the scale of stored pixels, 0 to 255.

    Returns:
        float32 (C, 1, 1) both, on the device; the same tensors at each call, read-only.
    """
    with torch.inference_mode(False):
        mean_C11, std_C11 = (255 * torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
        return mean_C11.to(device), std_C11.to(device)
