"""Training by the labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from litdeploy.config.recipe import Recipe
from litdeploy.trainer.objectives.objective import Init, Method, Objective, Outputs, Start, TrainingPhase


class CrossEntropy(Objective, Method):
    """Training from scratch by the labels alone: no teacher, nothing copied."""

    needs_teacher = False

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(outputs.logits, outputs.labels)}

    @classmethod
    def init(cls, recipe: Recipe) -> Init:
        return "scratch"

    @classmethod
    def phases(cls, recipe: Recipe, start: Start) -> list[TrainingPhase]:
        return [TrainingPhase("scratch", recipe.main.model_copy(update={"epochs": recipe.epochs}), cls())]
