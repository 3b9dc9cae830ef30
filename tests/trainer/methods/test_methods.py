from __future__ import annotations

import pytest

from litdeploy.config.recipe import read_recipe
from litdeploy.networks.width import Match
from litdeploy.trainer.methods import METHODS, Start

SECTIONS = ("layer1", "layer2", "layer3")
START = Start(SECTIONS, [Match(name, name, 1, None) for name in SECTIONS])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_for_the_recipes_epochs(method: str) -> None:
    recipe = read_recipe("cifar10-resnet:paper")
    phases = METHODS[method].phases(recipe, START)
    assert sum(phase.settings.epochs for phase in phases) == 300
