"""InDistill."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.config.recipe import InDistillSettings, Recipe
from litdeploy.errors import SettingsError
from litdeploy.networks.width import Match
from litdeploy.trainer.objectives.distillation import Distillation
from litdeploy.trainer.objectives.objective import Init, Method, Objective, Outputs, Start, Student, TrainingPhase

# Epochs of the first layer to those of the next ones: 3 : 4 : 5, as in the authors' code.
_FIRST = 3
_EPS = 1e-6


class InDistill(Method):
    """InDistill (Sarridis et al., "InDistill: Information flow-preserving knowledge distillation for model
    compression", WACV 2025): a narrower student learns the teacher's strongest channels, one layer after the other and
    each for longer than the one before; then by L_KD or PKT.
    """

    student: ClassVar[Student] = "own"

    @classmethod
    def init(cls, recipe: Recipe) -> Init:
        return "scratch"

    @classmethod
    def phases(cls, recipe: Recipe, start: Start) -> list[TrainingPhase]:
        settings = recipe.indistill or InDistillSettings()
        layers = len(start.matches)
        if recipe.epochs <= layers:
            raise SettingsError(
                f"{recipe.epochs} epochs: method 'indistill' needs one for each of {layers} sections and one after "
                f"them. Give --epochs {layers + 1} or more"
            )
        guided = min(max(layers, round(recipe.epochs * settings.share)), recipe.epochs - 1)
        phases = [
            TrainingPhase(match.student, recipe.main.model_copy(update={"epochs": epochs}), Layer(match))
            for match, epochs in zip(start.matches, growing(guided, layers), strict=True)
        ]
        last = recipe.main.model_copy(update={"epochs": recipe.epochs - guided})
        objective: Objective = (
            Distillation(recipe)
            if settings.then == "kd"
            else ProbabilisticTransfer(start.matches[-1].student, settings.pkt_weight, settings.label_weight)
        )
        return [*phases, TrainingPhase(settings.then, last, objective)]


def growing(epochs: int, layers: int) -> list[int]:
    """Shares epochs out among layers, the later ones getting more; each gets one where there are as many.

    >>> growing(12, 3)
    [3, 4, 5]
    """
    weights = [_FIRST + layer for layer in range(layers)]
    ends = [round(epochs * sum(weights[: layer + 1]) / sum(weights)) for layer in range(layers)]
    return sorted(max(1, end - before) for end, before in zip(ends, [0, *ends], strict=False))


class Layer(Objective):
    """One layer of the curriculum: mse(S_i(x), the kept channels of T_i), over all elements.

    Nothing behind that section is trained meanwhile.
    """

    def __init__(self, match: Match) -> None:
        self.chain = (match.student,)
        self._match = match

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        student, teacher = outputs.chain[self.chain[0]]
        if self._match.channels is not None:
            teacher = teacher.index_select(self._match.dim, self._match.channels)
        return {"loss": F.mse_loss(student.float(), teacher.float())}


class ProbabilisticTransfer(Objective):
    """Probabilistic knowledge transfer (Passalis & Tefas, ECCV 2018; with both kernels as in the InDistill authors'
    code): the student's embeddings of a batch are to be as similar to one another as the teacher's are.

    L = w_pkt · Σ_kernel mean_ij (t_ij − s_ij) · (ln t_ij − ln s_ij) + w_labels · CE(S(x), y)

    where t and s are a kernel's values on teacher and student with rows that sum to 1; the kernels are
    (1 + cosine) / 2 and 1 / (1 + L2 distance). An embedding is the mean of the last section's output over its
    positions. Without labels, as published, the head is not trained.
    """

    def __init__(self, section: str, weight: float, label_weight: float) -> None:
        self.chain = (section,)
        self._weight = weight
        self._label_weight = label_weight

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        student_NE, teacher_NE = (embedding(output) for output in outputs.chain[self.chain[0]])
        with torch.autocast(student_NE.device.type, enabled=False):  # bf16 cannot tell similarities near 1 apart
            pairs = [(_cosine(teacher_NE), _cosine(student_NE)), (_nearness(teacher_NE), _nearness(student_NE))]
            pkt = torch.stack([_divergence(teacher, student) for teacher, student in pairs]).sum()
        losses = {"loss": self._weight * pkt, "pkt": pkt}
        if self._label_weight:
            losses["labels"] = F.cross_entropy(outputs.logits, outputs.labels)
            losses["loss"] = losses["loss"] + self._label_weight * losses["labels"]
        return losses


def embedding(output: Tensor) -> Tensor:
    """A section's output (N, C, H, W), (N, tokens, C) or (N, C) → (N, C), float32: the mean over positions."""
    output = output.float()
    return output.mean((2, 3)) if output.dim() == 4 else output.mean(1) if output.dim() == 3 else output


def _cosine(x_NE: Tensor) -> Tensor:
    unit_NE: Tensor = x_NE / (x_NE.norm(dim=1, keepdim=True) + _EPS)
    return (unit_NE @ unit_NE.T + 1) / 2


def _nearness(x_NE: Tensor) -> Tensor:
    squares_N = x_NE.square().sum(1)
    squared_NN = (squares_N[:, None] + squares_N[None] - 2 * x_NE @ x_NE.T).clamp(min=0)
    return 1 / (1 + (squared_NN + _EPS).sqrt())


def _divergence(teacher_NN: Tensor, student_NN: Tensor) -> Tensor:
    """Jeffreys divergence of the kernels' rows; the logarithm of opposite embeddings' 0 is kept finite."""
    teacher_NN, student_NN = ((k / k.sum(1, keepdim=True)).clamp(min=_EPS) for k in (teacher_NN, student_NN))
    return ((teacher_NN - student_NN) * (teacher_NN.log() - student_NN.log())).mean()
