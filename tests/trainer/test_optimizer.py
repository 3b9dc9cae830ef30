"""The optimizer's update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from litdeploy.config.recipe import Phase, Recipe
from litdeploy.networks.families.resnet import resnet
from litdeploy.trainer.optimizer import new_optimizer, with_optimizer
from litdeploy.trainer.resolve import resolve_recipe


def steps(recipe: Recipe, device: str = "cpu", count: int = 3) -> torch.Tensor:
    """A weight after some steps; another one is frozen and has to stay."""
    student = nn.Linear(3, 2, bias=False, device=device)
    frozen = nn.Linear(2, 1, bias=False, device=device).requires_grad_(False)
    with torch.no_grad():
        student.weight.copy_(torch.linspace(-1, 2, 6).view(2, 3))
        frozen.weight.fill_(0.5)
    network = nn.Sequential(student, frozen)
    optimizer = new_optimizer(network, recipe, Phase(epochs=1, learning_rate=0.1), torch.device(device))
    for step in range(count):
        optimizer.zero_grad()
        network(torch.full((1, 3), step + 1.0, device=device)).square().sum().backward()
        optimizer.step()
    assert (frozen.weight == 0.5).all()
    return student.weight.detach().cpu()


def by_hand(count: int, beta1: float, beta2: float, weight_decay: float, rate: float = 0.1) -> torch.Tensor:
    """Algorithm 2 of Loshchilov & Hutter (ICLR 2019), with the gradient of `steps` written out."""
    weight = torch.linspace(-1, 2, 6).view(2, 3).double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, count + 1):
        x = torch.full((3,), float(step)).double()
        gradient = (2 * 0.5 * (0.5 * (weight @ x).sum())) * x.expand(2, 3)
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + 1e-8)
        weight = weight - rate * (update + weight_decay * weight)
    return weight.float()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.99)])
def test_adamw_decouples_the_decay(betas: tuple[float, float]) -> None:
    found = steps(Recipe(optimiser="adamw", betas=betas, weight_decay=0.3))
    torch.testing.assert_close(found, by_hand(3, *betas, 0.3), rtol=1e-5, atol=1e-6)


def test_sgd_adds_the_decay_to_the_gradient() -> None:
    student = torch.linspace(-1, 2, 6).view(2, 3)
    gradient = 2 * 0.5 * (0.5 * student.sum())
    found = steps(Recipe(optimiser="sgd", weight_decay=0.1), count=1)
    torch.testing.assert_close(found, student - 0.1 * (gradient + 0.1 * student))


@pytest.mark.gpu
def test_the_fused_update_is_the_same() -> None:
    recipe = Recipe(optimiser="adamw", weight_decay=0.3)
    torch.testing.assert_close(steps(recipe, "cuda"), steps(recipe), rtol=1e-5, atol=1e-6)


def transformer() -> nn.Module:
    return nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 8, norm_first=True) for _ in range(2)))


@pytest.mark.parametrize(
    ("network", "stated", "expected"),
    [
        (resnet(8, width=2), {}, ("sgd", 0.1, 0.01, 5e-4)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)), {}, ("sgd", 0.1, 0.01, 5e-4)),
        (transformer(), {}, ("adamw", 5e-4, 1e-4, 0.01)),
        (transformer(), {"optimiser": "sgd"}, ("sgd", 0.1, 0.01, 5e-4)),
        (transformer(), {"weight_decay": 0.0}, ("adamw", 5e-4, 1e-4, 0.0)),
        (transformer(), {"main": Phase(epochs=2, learning_rate=2e-3)}, ("adamw", 2e-3, 1e-4, 0.01)),
        (nn.Sequential(resnet(8, width=2), nn.LayerNorm(10)), {}, ("sgd", 0.1, 0.01, 5e-4)),
    ],
)
def test_what_a_recipe_leaves_open_follows_the_kind_of_network(
    network: nn.Module, stated: dict[str, Any], expected: tuple[str, float, float, float]
) -> None:
    notes: list[str] = []
    filled = with_optimizer(Recipe(**stated), network, notes.append)
    assert (filled.optimiser, filled.main.rate, filled.finetune.rate, filled.weight_decay) == expected
    assert len(notes) == 1
    assert with_optimizer(filled, network, notes.append) == filled
    assert len(notes) == 1


def test_a_recipe_with_a_learning_rate_means_what_it_meant() -> None:
    """When sgd, and a weight decay of 5e-4, were the defaults for every network."""
    main = Phase(epochs=2, learning_rate=0.05)
    found = resolve_recipe(Recipe(main=main), {"data": "digits"})
    assert (found.optimiser, found.weight_decay) == ("sgd", 5e-4)
    found = resolve_recipe(Recipe(main=main, optimiser="adamw"), {"data": "digits"})
    assert (found.optimiser, found.weight_decay) == ("adamw", 5e-4)
    found = resolve_recipe(Recipe(), {"data": "digits", "learning_rate": 0.05})
    assert (found.optimiser, found.main.rate, found.weight_decay) == ("auto", 0.05, None)
