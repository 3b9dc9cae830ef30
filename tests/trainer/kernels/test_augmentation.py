from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which is for Linux and Windows only")

from litdeploy.config.recipe import Augmentation
from litdeploy.config.spec import InputSpec
from litdeploy.data import draw_crops, pixel_scale
from litdeploy.trainer.kernels import augmentation, reference

# Triton's interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(1, 8, 8), (3, 32, 32), (3, 7, 9), (4, 33, 31), (2, 1, 5)]
SPREAD = Augmentation(padding=2, flip=True)


def pixels(shape: tuple[int, ...], device: torch.device, count: int = 11) -> Tensor:
    # From 1, so that 0 can only be padding.
    drawn = torch.randint(1, 256, (count, *shape), generator=torch.Generator().manual_seed(0))
    return drawn.to(device, torch.uint8)


def check(
    source: Tensor, rows: Tensor, recipe: Augmentation = SPREAD, dtype: torch.dtype = torch.float32, seed: int = 0
) -> None:
    channels, height, width = source.shape[1:]
    spec = InputSpec(
        shape=(channels, height, width), mean=(0.485, 0.456, 0.406, 0.5)[:channels], std=(0.229, 0.1, 0.3, 2)[:channels]
    )
    crops = draw_crops(len(rows), recipe, torch.Generator().manual_seed(seed)).to(source.device)
    found, expected = (way.augmented(source, rows, crops, spec, dtype) for way in (augmentation, reference))
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pixel(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check(pixels(shape, device), torch.tensor([10, 3, 3, 0, 7], device=device), dtype=dtype)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (4, False), (4, True)])
def test_every_kind_of_augmentation(padding: int, flip: bool, device: torch.device) -> None:
    check(pixels((3, 7, 9), device), torch.arange(11, device=device), Augmentation(padding=padding, flip=flip))


def test_many_draws(device: torch.device) -> None:
    check(pixels((1, 5, 4), device), torch.arange(200, device=device) % 11)


def test_tensors_with_gaps_in_memory(device: torch.device) -> None:
    rows = torch.arange(10, device=device)[::3]
    check(pixels((3, 8, 8), device).to(memory_format=torch.channels_last), rows)
    check(pixels((6, 8, 8), device, 22)[::2, ::2, 1:, :7], rows)


def test_it_is_a_proper_operator(device: torch.device) -> None:
    spec = InputSpec(shape=(3, 8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    crops = draw_crops(2, SPREAD, torch.Generator().manual_seed(0)).to(device)
    rows = torch.tensor([3, 1], device=device)
    draws = (crops.tops_N, crops.lefts_N, crops.flips_N)
    arguments = (pixels((3, 8, 8), device), rows, *draws, *pixel_scale(spec, device), crops.padding, torch.bfloat16)
    torch.library.opcheck(augmentation.augmented_op, arguments)
