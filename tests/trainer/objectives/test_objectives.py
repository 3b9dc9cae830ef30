from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litdeploy.recipe import Recipe, read_recipe
from litdeploy.trainer.objectives import (
    OBJECTIVES,
    CrossEntropy,
    Distillation,
    Hint,
    Lit,
    LitSections,
    Outputs,
)

SECTIONS = ("layer1", "layer2", "layer3")
LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]], requires_grad=True)
TEACHER = torch.tensor([[3.0, -1.0, 0.0], [0.0, 1.0, 0.0]])
LABELS = torch.tensor([0, 2])


def test_lit_weighs_its_parts() -> None:
    recipe = Recipe(beta=0.25, section_weight=2.0)
    branches = {"layer1": (torch.ones(2, 3), torch.zeros(2, 3)), "layer2": (torch.full((4,), 3.0), torch.zeros(4))}
    found = Lit(recipe, tuple(branches)).losses(Outputs(LOGITS, LABELS, TEACHER, branches))
    assert found["section/layer1"] == 1
    assert found["section/layer2"] == 9
    torch.testing.assert_close(found["loss"], 0.25 * found["kd"] + 0.75 * 2 * 10)


def test_with_beta_0_lit_is_its_sections_alone() -> None:
    branches = {"layer1": (torch.ones(2, 3), torch.zeros(2, 3)), "layer2": (torch.full((4,), 3.0), torch.zeros(4))}
    recipe = Recipe(beta=0.0, section_weight=2.0)
    phases = Lit.phases(recipe, tuple(branches))
    sections = phases[0].objective
    assert isinstance(sections, LitSections)
    with_chain = Lit(recipe, tuple(branches)).losses(Outputs(LOGITS, LABELS, TEACHER, branches))
    found = sections.losses(Outputs(torch.empty(0), LABELS, TEACHER, branches))
    assert found == {name: loss for name, loss in with_chain.items() if name != "kd"}
    assert sections.only(["layer2"]).branches == ("layer2",)
    assert phases[1].objective.needs_chain


def test_a_hint_compares_one_section_through_a_regressor_where_widths_differ() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    regressor = nn.Conv2d(3, 5, 1)
    hint = Hint(SECTIONS, regressor)
    assert hint.chain == ("layer2",)
    found = hint.losses(Outputs(LOGITS, LABELS, TEACHER, chain={"layer2": (student, teacher)}))
    torch.testing.assert_close(found["loss"], 0.5 * F.mse_loss(regressor(student), teacher))
    assert list(hint.parameters()) == list(regressor.parameters())


def test_scratch_is_cross_entropy() -> None:
    found = CrossEntropy().losses(Outputs(LOGITS, LABELS))
    torch.testing.assert_close(found["loss"], F.cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_method_trains_for_the_recipes_epochs(method: str) -> None:
    recipe = read_recipe("cifar10-resnet:paper")
    phases = OBJECTIVES[method].phases(recipe, SECTIONS)
    assert sum(phase.settings.epochs for phase in phases) == 300


def test_lit_fine_tunes_by_distillation_alone() -> None:
    lit, finetune = Lit.phases(Recipe(), SECTIONS)
    assert lit.objective.freezes
    assert isinstance(finetune.objective, Distillation)
    assert not finetune.objective.freezes
