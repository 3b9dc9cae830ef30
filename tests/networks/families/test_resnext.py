from __future__ import annotations

import pytest
import torch

from litdeploy.errors import NetworkError
from litdeploy.networks.families.resnext import resnext


@pytest.mark.parametrize(("cardinality", "millions"), [(8, 34.4), (16, 68.1)])
def test_parameters_are_the_papers(cardinality: int, millions: float) -> None:
    """Xie et al., table 7: ResNeXt-29, 8×64d and 16×64d."""
    with torch.device("meta"):
        network = resnext(29, cardinality=cardinality, width=64)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_any_classes_channels_and_size() -> None:
    network = resnext(11, classes=100, cardinality=2, width=4, out_width=16, stem_width=8, in_channels=1)
    assert network(torch.randn(2, 1, 9, 9)).shape == (2, 100)
    assert network.layer2[0].conv2.groups == 2


@pytest.mark.parametrize("arguments", [{"depth": 28}, {"depth": 2}, {"cardinality": 0}])
def test_what_is_no_such_network_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(NetworkError):
        resnext(**arguments)
