from __future__ import annotations

import pytest
import torch
from torch import nn

from litdeploy.config.spec import InputSpec
from litdeploy.data import normalise
from litdeploy.exporter.ends import Ends

SPEC = InputSpec(shape=(3, 4, 5), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def test_pixels_are_normalised_as_training_normalises_them() -> None:
    pixels_NCHW = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ends = Ends(nn.Flatten(), SPEC, embedded=True)
    expected = normalise(pixels_NCHW, SPEC).flatten(1)
    torch.testing.assert_close(ends(pixels_NCHW.permute(0, 2, 3, 1).contiguous()), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("embedded", [True, False])
def test_an_example_is_taken(embedded: bool) -> None:
    ends = Ends(nn.Flatten(), SPEC, dtype=torch.float16, embedded=embedded)
    example = ends.example(torch.zeros(2, 3, 4, 5))
    assert (example.dtype, tuple(example.shape)) == (
        (torch.uint8, (2, 4, 5, 3)) if embedded else (torch.float16, (2, 3, 4, 5))
    )
    assert (ends(example).dtype, tuple(ends(example).shape)) == (torch.float16, (2, 60))
