"""The optimizer's update."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from litdeploy.config.recipe import Phase, Recipe
from litdeploy.trainer.optimizer import new_optimizer


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


def test_sgd_is_what_a_recipe_has_that_says_nothing() -> None:
    student = torch.linspace(-1, 2, 6).view(2, 3)
    gradient = 2 * 0.5 * (0.5 * student.sum())
    found = steps(Recipe(weight_decay=0.1), count=1)
    torch.testing.assert_close(found, student - 0.1 * (gradient + 0.1 * student))


@pytest.mark.gpu
def test_the_fused_update_is_the_same() -> None:
    recipe = Recipe(optimiser="adamw", weight_decay=0.3)
    torch.testing.assert_close(steps(recipe, "cuda"), steps(recipe), rtol=1e-5, atol=1e-6)
