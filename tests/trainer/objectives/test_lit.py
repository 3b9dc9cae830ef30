from __future__ import annotations

import torch

from litdeploy.config.recipe import Recipe
from litdeploy.trainer.methods import Start
from litdeploy.trainer.methods.plain import lit
from litdeploy.trainer.objectives import Distillation, Lit, LitSections, Outputs

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


def test_lit_is_its_formula() -> None:
    """L = β · L_KD + (1 − β) · w · Σ_i mse(S_i(T_{i−1}), T_i); ten steps of it are in tests/trainer/test_golden.py."""
    torch.manual_seed(0)
    branches = {name: (torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)) for name in SECTIONS}
    recipe = Recipe(alpha=0.95, beta=0.05, temperature=6.0, section_weight=1.5)
    found = Lit(recipe, SECTIONS).losses(Outputs(LOGITS, LABELS, TEACHER, branches))
    hard = -(LOGITS.log_softmax(1)[0, 0] + LOGITS.log_softmax(1)[1, 2]) / 2
    t, s = (TEACHER / 6).softmax(1), (LOGITS / 6).softmax(1)
    kd = 0.95 * hard + 0.05 * 36 * (t * (t.log() - s.log())).sum() / 2
    sections = sum((ours - theirs).square().sum() / 24 for ours, theirs in branches.values())
    torch.testing.assert_close(found["loss"], 0.05 * kd + 0.95 * 1.5 * sections)
    gradients = torch.autograd.grad(found["loss"], [ours for ours, _ in branches.values()])
    for gradient, (ours, theirs) in zip(gradients, branches.values(), strict=True):
        torch.testing.assert_close(gradient, 0.95 * 1.5 * 2 * (ours - theirs).detach() / 24)


def test_with_beta_0_lit_is_its_sections_alone() -> None:
    branches = {"layer1": (torch.ones(2, 3), torch.zeros(2, 3)), "layer2": (torch.full((4,), 3.0), torch.zeros(4))}
    recipe = Recipe(beta=0.0, section_weight=2.0)
    phases = lit(recipe, Start(tuple(branches)))
    sections = phases[0].objective
    assert isinstance(sections, LitSections)
    with_chain = Lit(recipe, tuple(branches)).losses(Outputs(LOGITS, LABELS, TEACHER, branches))
    found = sections.losses(Outputs(torch.empty(0), LABELS, TEACHER, branches))
    assert found == {name: loss for name, loss in with_chain.items() if name != "kd"}
    assert sections.only(["layer2"]).branches == ("layer2",)
    assert phases[1].objective.needs_chain


def test_lit_fine_tunes_by_distillation_alone() -> None:
    first, finetune = lit(Recipe(), Start(SECTIONS))
    assert first.objective.freezes
    assert isinstance(finetune.objective, Distillation)
    assert not finetune.objective.freezes
