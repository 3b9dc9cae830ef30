from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from litdeploy.errors import NetworkError
from litdeploy.networks.families.resnet import FAMILY, ZeroPadding, resnet


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_parameters_are_the_papers(depth: int, millions: float) -> None:
    """He et al., table 6."""
    assert sum(p.numel() for p in resnet(depth).parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("shortcut", ["A", "A-end", "B"])
@pytest.mark.parametrize("size", [8, 32, 33])
def test_any_classes_channels_and_size(shortcut: str, size: int) -> None:
    network = resnet(8, classes=7, shortcut=shortcut, width=4, in_channels=1)  # type: ignore[arg-type]
    assert network(torch.randn(2, 1, size, size)).shape == (2, 7)


def test_the_two_paddings_share_weights_and_differ_in_function() -> None:
    symmetric, at_end = resnet(8, shortcut="A").eval(), resnet(8, shortcut="A-end").eval()
    at_end.load_state_dict(symmetric.state_dict())
    example = torch.randn(2, 3, 8, 8)
    assert not torch.allclose(symmetric(example), at_end(example))


def test_padding_is_zeros_around_every_other_pixel() -> None:
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(ZeroPadding(4, 2, at_end=False)(x), F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
    assert torch.equal(ZeroPadding(4, 2, at_end=True)(x)[:, :4], x[:, :, ::2, ::2])


@pytest.mark.parametrize("arguments", [{"depth": 21}, {"depth": 2}, {"shortcut": "C"}, {"classes": 0}, {"width": 0}])
def test_what_is_no_such_network_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(NetworkError):
        resnet(**arguments)  # type: ignore[arg-type]


def test_input_of_many_channels_is_described() -> None:
    assert FAMILY.input({"in_channels": 4}).shape == (4, 32, 32)
