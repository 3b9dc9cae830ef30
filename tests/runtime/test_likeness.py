from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from litdeploy.config.spec import InputSpec
from litdeploy.errors import DataError
from litdeploy.runtime.likeness import MOST_DB, likeness, of_images, ssim

HALF = InputSpec(shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)


def _plain_ssim(x_HW: np.ndarray, y_HW: np.ndarray) -> float:
    """Wang et al., 2004, window by window."""
    places = np.arange(11) - 5
    line = np.exp(-(places**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    found = []
    for top in range(x_HW.shape[0] - 10):
        for left in range(x_HW.shape[1] - 10):
            x, y = (image[top : top + 11, left : left + 11] for image in (x_HW, y_HW))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            c1, c2 = 0.01**2, 0.03**2
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


def test_both_are_as_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 3, 16, 13, generator=generator) * 2 - 1 for _ in range(2))
    unit_x, unit_y = ((images.double().numpy() + 1) / 2 for images in (x, y))
    found = of_images(x, y, HALF)
    expected = np.mean([_plain_ssim(unit_x[n, c], unit_y[n, c]) for n in range(2) for c in range(3)])
    assert found.ssim == pytest.approx(expected, abs=1e-9)
    assert found.psnr == pytest.approx(10 * math.log10(1 / ((unit_x - unit_y) ** 2).mean()))


def test_in_batches_it_is_the_same_as_at_once() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(5, 3, 16, 16, generator=generator) for _ in range(2))
    answers = {"x": iter(x.split(2)), "y": iter(y.split(2))}
    found = likeness(lambda _: next(answers["x"]), lambda _: next(answers["y"]), x.split(2), HALF)
    at_once = of_images(x, y, HALF)
    assert (found.psnr, found.ssim) == (pytest.approx(at_once.psnr), pytest.approx(at_once.ssim))
    assert found.images == 5


def test_equal_images_and_images_smaller_than_the_window() -> None:
    x = torch.rand(1, 3, 6, 8)
    assert of_images(x, x, HALF).psnr == MOST_DB
    assert ssim(x, x, HALF).item() == pytest.approx(1)


def test_no_images_are_refused() -> None:
    with pytest.raises(DataError, match="split is empty"):
        likeness(lambda batch: torch.empty(0), lambda batch: torch.empty(0), [], HALF)
