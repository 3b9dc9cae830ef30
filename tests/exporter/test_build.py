from __future__ import annotations

import pytest
import torch
from torch import nn

from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import InputSpec
from litdeploy.data import normalise, open_data
from litdeploy.errors import DataError
from litdeploy.exporter.build import Calibration, ExportWrapper
from litdeploy.networks import Network

SPEC = InputSpec(shape=(3, 4, 5), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def test_pixels_are_normalised_as_training_normalises_them() -> None:
    pixels_NCHW = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ends = ExportWrapper(nn.Flatten(), SPEC, embedded=True)
    expected = normalise(pixels_NCHW, SPEC).flatten(1)
    torch.testing.assert_close(ends(pixels_NCHW.permute(0, 2, 3, 1).contiguous()), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("embedded", [True, False])
def test_an_example_is_taken(embedded: bool) -> None:
    ends = ExportWrapper(nn.Flatten(), SPEC, dtype=torch.float16, embedded=embedded)
    example = ends.example(torch.zeros(2, 3, 4, 5))
    assert (example.dtype, tuple(example.shape)) == (
        (torch.uint8, (2, 4, 5, 3)) if embedded else (torch.float16, (2, 3, 4, 5))
    )
    assert (ends(example).dtype, tuple(ends(example).shape)) == (torch.float16, (2, 60))


def test_calibration_takes_the_same_training_images_each_time(student: Network) -> None:
    data = open_data(DataSettings(source="digits"), torch.device("cpu"), 0)
    found = [Calibration(data, student, 32).inputs for _ in range(2)]
    assert torch.equal(*found)
    assert found[0].shape == (32, 1, 8, 8)
    assert found[0].dtype == torch.float32


def test_fewer_training_images_than_asked_are_an_error(student: Network) -> None:
    data = open_data(DataSettings(source="digits"), torch.device("cpu"), 0)
    count = len(data.train)
    with pytest.raises(
        DataError, match=f"has {count} training images, fewer than the {count + 1} .* --calibration-images {count}"
    ):
        _ = Calibration(data, student, count + 1).inputs
