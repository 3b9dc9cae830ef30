from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.families.resnext import resnext
from litdeploy.networks.folding import fold_batch_norms
from tests import sections


def used(module: nn.Module, example: Tensor) -> nn.Module:
    """The module in eval mode, with statistics and weights that are not those of a new network."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.dim() == 1:
                value.add_(torch.rand(value.shape, generator=generator), alpha=0.3)
        module.train()
        for _ in range(3):
            module(torch.randn(16, *example.shape[1:], generator=generator))
    return module.eval()


IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("network", "norms"),
    [
        (resnet(20, width=4), 19),
        (resnet(20, width=4, shortcut="B"), 21),
        (resnext(20, cardinality=2, width=4), 22),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 8), nn.BatchNorm1d(8)), 2),
    ],
    ids=["resnet-A", "resnet-B", "resnext", "linear"],
)
def test_a_folded_network_computes_the_same_without_batch_norms(network: nn.Module, norms: int) -> None:
    network = used(network, IMAGES)
    folded = copy.deepcopy(network)
    assert fold_batch_norms(folded, IMAGES) == norms
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-4)


class Shared(nn.Module):
    """Its first convolution is read by the batch norm and by the sum; its second runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.one_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.two, self.two_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y = self.one_norm(y) + y
        return torch.as_tensor(self.two_norm(self.two(torch.relu(self.two(y)))))


def test_what_others_read_too_or_what_runs_twice_is_left() -> None:
    network = used(Shared(), IMAGES)
    expected = network(IMAGES)
    assert fold_batch_norms(network, IMAGES) == 0
    assert torch.equal(network(IMAGES), expected)


def test_nothing_is_folded_across_the_border_of_a_section() -> None:
    network = used(nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)), IMAGES)
    assert fold_batch_norms(copy.deepcopy(network), IMAGES) == 1
    assert fold_batch_norms(network, IMAGES, sections.of(network, ["0"])) == 0


def test_a_network_without_batch_norms_is_left() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval()
    assert fold_batch_norms(network, IMAGES) == 0


class Activated(nn.BatchNorm2d):
    """As timm's `BatchNormAct2d`: the activation is inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.act(self.drop(super().forward(x))))


class Leaky(nn.BatchNorm2d):
    """As InPlaceABN: the activation is no module."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(super().forward(x))


class Standardised(nn.Conv2d):
    """As timm's `StdConv2d`: what is folded into its weight would be standardised away."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def test_an_activation_inside_a_norm_stays() -> None:
    network = used(nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4), nn.Conv2d(4, 4, 3), Activated(4)), IMAGES)
    folded = copy.deepcopy(network)
    assert fold_batch_norms(folded, IMAGES) == 2
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "network",
    [nn.Sequential(nn.Conv2d(3, 4, 3), Leaky(4)), nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4))],
    ids=["norm", "convolution"],
)
def test_what_would_not_compute_the_same_is_left(network: nn.Module) -> None:
    network = used(network, IMAGES)
    expected = network(IMAGES)
    assert fold_batch_norms(network, IMAGES) == 0
    assert torch.equal(network(IMAGES), expected)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnext26ts", "resnetv2_50", "densenet121"])
def test_networks_of_timm_compute_the_same(name: str) -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision is not of this torch
        pytest.skip(f"timm cannot be imported: {error}")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    network = used(timm.create_model(name, num_classes=10), images)
    folded = copy.deepcopy(network)
    assert fold_batch_norms(folded, images) > 0
    with torch.no_grad():
        torch.testing.assert_close(folded(images), network(images), rtol=1e-3, atol=1e-3)
