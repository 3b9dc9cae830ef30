"""Losses of logits, compared with their formulas written out number by number."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from litdeploy.config.recipe import Recipe
from litdeploy.tasks import TASKS
from litdeploy.trainer.methods import Start
from litdeploy.trainer.methods.plain import hint, kd
from litdeploy.trainer.objectives import CrossEntropy, Distillation, Hint, Outputs

STUDENT = [[2.0, 0.0, -1.0], [0.5, 0.25, 0.0], [-3.0, 8.0, 1.0]]
TEACHER = [[3.0, -1.0, 0.0], [0.0, 1.0, 0.0], [-6.0, 20.0, 4.0]]
LABELS = [0, 2, 1]


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def transcription(alpha: float, tau: float) -> tuple[float, list[list[float]]]:
    """α · CE(S, y) + (1 − α) · τ² · KL(softmax(T/τ) ‖ softmax(S/τ)), mean over images, and its gradient by S."""
    loss, gradient = 0.0, []
    for s, t, label in zip(STUDENT, TEACHER, LABELS, strict=True):
        hard, soft, wanted = softmax(s), softmax(s, tau), softmax(t, tau)
        divergence = sum(p * (math.log(p) - math.log(q)) for p, q in zip(wanted, soft, strict=True))
        loss += (alpha * -math.log(hard[label]) + (1 - alpha) * tau**2 * divergence) / len(LABELS)
        gradient.append(
            [
                (alpha * (hard[k] - (k == label)) + (1 - alpha) * tau * (soft[k] - wanted[k])) / len(LABELS)
                for k in range(3)
            ]
        )
    return loss, gradient


@pytest.mark.parametrize(("alpha", "tau"), [(0.95, 6.0), (0.1, 4.0), (0.0, 1.0), (1.0, 2.0)])
def test_distillation_is_its_formula(alpha: float, tau: float) -> None:
    logits = torch.tensor(STUDENT, requires_grad=True)
    (phase,) = kd(Recipe(method="kd", alpha=alpha, temperature=tau), Start())
    found = phase.objective.losses(Outputs(logits, torch.tensor(LABELS), torch.tensor(TEACHER)))["loss"]
    expected, gradient = transcription(alpha, tau)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    torch.testing.assert_close(logits.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-6)


def test_scratch_is_cross_entropy() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]]), torch.tensor([0, 2])
    found = CrossEntropy().losses(Outputs(logits, labels))
    right = [math.exp(2) / (math.exp(2) + 1 + math.exp(-1)), 1 / (2 * math.exp(0.5) + 1)]
    assert found["loss"].item() == pytest.approx(-(math.log(right[0]) + math.log(right[1])) / 2, rel=1e-6)


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
    guided, distilled = hint(Recipe(method="hint", hint_share=0.3), Start(("layer1", "layer2", "layer3")))
    assert (guided.settings.epochs, distilled.settings.epochs) == (3, 7)
    assert isinstance(guided.objective, Hint)
    assert isinstance(distilled.objective, Distillation)


def test_another_task_learns_by_its_own_loss() -> None:
    student, teacher = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    outputs = Outputs(student, torch.tensor([-1, -1]), teacher, inputs=torch.zeros(2, 1))
    found = Distillation(Recipe(alpha=0), TASKS["embedding"]).losses(outputs)["loss"]
    torch.testing.assert_close(found, (1 - F.cosine_similarity(student, teacher)).mean())
    boxes = {"boxes": student}
    several = Outputs(boxes, torch.tensor([-1, -1]), {"boxes": teacher})
    found = Distillation(Recipe(alpha=0), TASKS["tree"]).losses(several)["loss"]
    torch.testing.assert_close(found, (student - teacher).square().mean() / teacher.var(correction=0))
