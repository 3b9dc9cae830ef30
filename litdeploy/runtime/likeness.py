"""How near a network's images come to another's: PSNR and SSIM.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.config.spec import InputSpec
from litdeploy.errors import DataError, RunnerError
from litdeploy.networks.batch import Batch, size_of
from litdeploy.storage.records import MOST_DB, Likeness

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def likeness(
    reference: Callable[[Batch], Tensor],
    candidate: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    spec: InputSpec,
) -> Likeness:
    """PSNR and SSIM of the candidate's images against the reference's, over all batches.

    Args:
        reference, candidate: what a network takes → images (N, C, H, W), normalised as its input is.
        batches: on the device of both.
        spec: of the images.

    Raises:
        DataError: there are no batches.
        RunnerError: the images are not of one size.
    """
    sums: Tensor | None = None
    images = 0
    with torch.no_grad():
        for batch in batches:
            expected, found = (run(batch) for run in (reference, candidate))
            if expected.shape != found.shape:
                raise RunnerError(
                    f"images of {tuple(found.shape)} cannot be held against such of {tuple(expected.shape)}: the files "
                    "are not of one network. Export the student again, or name its own teacher: --teacher FILE"
                )
            both = torch.stack([squared_error(expected, found, spec).sum(), ssim(expected, found, spec).sum()])
            sums = both if sums is None else sums + both
            images += size_of(batch)
    if sums is None:
        raise DataError("there are no images to compare on: the split is empty. Give --data a dataset with images.")
    square, similar = (sums / images).tolist()
    return _found(square, similar, images)


def of_images(expected_NCHW: Tensor, found_NCHW: Tensor, spec: InputSpec) -> Likeness:
    """PSNR and SSIM of images against images, both normalised. See `likeness`."""
    square = squared_error(expected_NCHW, found_NCHW, spec).mean().item()
    similar = ssim(expected_NCHW, found_NCHW, spec).mean().item()
    return _found(square, similar, len(expected_NCHW))


def decibels(square: float) -> float:
    """PSNR of a mean squared difference where values lie between 0 and 1: −10 · log10, no further than `MOST_DB`."""
    if not math.isfinite(square):
        return -MOST_DB
    return MOST_DB if square <= 10 ** (-MOST_DB / 10) else max(-MOST_DB, -10 * math.log10(square))


def _found(square: float, similar: float, images: int) -> Likeness:
    # Where both are equal, rounding may leave an SSIM just above 1.
    ssim = max(-1.0, min(1.0, similar)) if math.isfinite(similar) else -1.0
    return Likeness(psnr=decibels(square), ssim=ssim, images=images)


def squared_error(expected_NCHW: Tensor, found_NCHW: Tensor, spec: InputSpec) -> Tensor:
    """Mean squared difference of each image (N), float64, where values lie between 0 and 1."""
    return (_values(found_NCHW, spec) - _values(expected_NCHW, spec)).square().mean((1, 2, 3))


def ssim(expected_NCHW: Tensor, found_NCHW: Tensor, spec: InputSpec) -> Tensor:
    """Structural similarity of each image (N), float64 (Wang et al., "Image Quality Assessment: From Error Visibility
    to Structural Similarity", 2004): a Gaussian window of 11×11 with σ 1.5 wherever it fits whole, mean over all places
    and channels. For images smaller than that the window is smaller.
    """
    x_NCHW, y_NCHW = _values(expected_NCHW, spec), _values(found_NCHW, spec)
    smallest = min(x_NCHW.shape[2:])
    window_11HW = _gaussian(min(_WINDOW, smallest - 1 + smallest % 2), x_NCHW)

    def local(values_NCHW: Tensor) -> Tensor:
        n, c, h, w = values_NCHW.shape
        return F.conv2d(values_NCHW.reshape(n * c, 1, h, w), window_11HW)

    mean_x, mean_y = local(x_NCHW), local(y_NCHW)
    var_x, var_y = local(x_NCHW.square()) - mean_x.square(), local(y_NCHW.square()) - mean_y.square()
    covariance = local(x_NCHW * y_NCHW) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    )
    return similarity.reshape(len(expected_NCHW), -1).mean(1)


def _gaussian(size: int, like: Tensor) -> Tensor:
    places = torch.arange(size, device=like.device, dtype=like.dtype) - (size - 1) / 2
    weights = torch.exp(-places.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    return torch.outer(weights, weights)[None, None]


def _values(images_NCHW: Tensor, spec: InputSpec) -> Tensor:
    """Values between 0 and 1, as far as the network keeps to them; float64."""
    mean_C11, std_C11 = (
        torch.tensor(each, device=images_NCHW.device, dtype=torch.float64).view(-1, 1, 1)
        for each in (spec.mean, spec.std)
    )
    return images_NCHW.double() * std_C11 + mean_C11
