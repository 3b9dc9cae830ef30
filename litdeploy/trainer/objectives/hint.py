"""Hint training."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from litdeploy.config.recipe import Recipe
from litdeploy.trainer.objectives.distillation import Distillation
from litdeploy.trainer.objectives.objective import Method, Objective, Outputs, Start, TrainingPhase


class Hint(Objective, Method):
    """One hint, then distillation (Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015).

    The student's output of its middle section, in its own chain, is drawn to the teacher's: ½ · mse. Nothing behind
    that section is trained meanwhile. The paper's regressor is for a narrower student, which this one never is.
    """

    def __init__(self, sections: Sequence[str]) -> None:
        self.chain = (sections[(len(sections) - 1) // 2],)

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        student, teacher = outputs.chain[self.chain[0]]
        return {"loss": 0.5 * F.mse_loss(student.float(), teacher.float())}

    @classmethod
    def phases(cls, recipe: Recipe, start: Start) -> list[TrainingPhase]:
        epochs = round(recipe.epochs * recipe.hint_share)
        guided = recipe.main.model_copy(update={"epochs": epochs})
        distilled = recipe.main.model_copy(update={"epochs": recipe.epochs - epochs})
        return [
            TrainingPhase("hint", guided, cls(start.sections)),
            TrainingPhase("kd", distilled, Distillation(recipe)),
        ]
