"""Losses of the student's own chain: cross-entropy, knowledge distillation and FitNets' hint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdeploy.config.recipe import Recipe
from litdeploy.tasks import Task, task_of
from litdeploy.trainer import kernels
from litdeploy.trainer.functions import Functions
from litdeploy.trainer.objectives.objective import Objective, Outputs


class CrossEntropy(Objective):
    """Cross-entropy with the labels, without a teacher."""

    needs_teacher = False
    needs_labels = True

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(outputs.logits, outputs.labels)}


class SparseCrossEntropy(CrossEntropy):
    """Network slimming's loss: CE(S(x), y) + s · Σ |γ|, over all channels of all batch norms.

    Args:
        sparsity: s.
        scales: the batch norms' γ.
    """

    def __init__(self, sparsity: float, scales: Sequence[nn.Parameter]) -> None:
        self._sparsity = sparsity
        self._scales = scales

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        labels = F.cross_entropy(outputs.logits, outputs.labels)
        scales = torch.cat([scale.float() for scale in self._scales]).abs().sum()
        return {"loss": labels + self._sparsity * scales, "labels": labels, "scales": scales}


def distillation_loss(recipe: Recipe, task: Task[Any] | Functions) -> Callable[[Outputs], Tensor]:
    """L_KD of a step's outputs: the user's own loss, or the task's, by the fused kernel if there is one.

    For classification: α · CE(S(x), y) + (1 − α) · τ² · KL(softmax(T(x)/τ) ‖ softmax(S(x)/τ)), mean over the batch.
    """
    alpha, temperature = recipe.alpha, recipe.temperature

    def of(outputs: Outputs) -> Tensor:
        teacher, labels = outputs.teacher_output, outputs.labels
        assert teacher is not None
        if isinstance(task, Functions):
            assert outputs.inputs is not None
            return task.loss(outputs.output, teacher, labels, outputs.inputs)
        if task.fused:
            assert isinstance(teacher, Tensor)
            return kernels.distillation_loss(outputs.logits, teacher, labels, alpha, temperature)
        return task.loss(outputs.output, teacher, labels, alpha, temperature, outputs.inputs)

    return of


class Distillation(Objective):
    """Knowledge distillation by the output alone (Hinton et al., 2015): the whole student learns by L_KD."""

    learns_by = "output"

    def __init__(self, recipe: Recipe, task: Task[Any] | Functions | None = None) -> None:
        self.recipe = recipe
        self._kd = distillation_loss(recipe, task or task_of(None))

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"loss": self._kd(outputs)}


class Hint(Objective):
    """FitNets' hint (Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015): ½ · mse between the outputs of the
    middle section, the student's in its own chain.

    Nothing behind that section is trained. The paper's regressor is for a narrower student; this one has the teacher's
    width.
    """

    learns_by = "output"

    def __init__(self, sections: Sequence[str]) -> None:
        self.chain = (sections[(len(sections) - 1) // 2],)

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        student, teacher = outputs.chain[self.chain[0]]
        return {"loss": 0.5 * F.mse_loss(student.float(), teacher.float())}
