from __future__ import annotations

import pytest
import torch

from litdeploy.config.recipe import Recipe
from litdeploy.trainer.objectives import Distillation, Hint, Outputs, Start


def test_a_hint_compares_the_middle_section() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    hint = Hint(("layer1", "layer2", "layer3"))
    assert hint.chain == ("layer2",)
    found = hint.losses(
        Outputs(torch.zeros(2, 3), torch.tensor([0, 2]), torch.zeros(2, 3), chain={"layer2": (student, teacher)})
    )
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    assert found["loss"].item() == pytest.approx(0.5 * sum((a - b) ** 2 for a, b in pairs) / teacher.numel(), rel=1e-5)


def test_after_the_hint_it_is_distilled() -> None:
    """Romero et al., "FitNets", ICLR 2015: stage-wise, the second stage as Hinton's."""
    guided, distilled = Hint.phases(Recipe(method="hint", hint_share=0.3), Start(("layer1", "layer2", "layer3")))
    assert (guided.settings.epochs, distilled.settings.epochs) == (3, 7)
    assert isinstance(guided.objective, Hint)
    assert isinstance(distilled.objective, Distillation)
