"""Training by the labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from litdeploy.recipe import Recipe
from litdeploy.trainer.objectives.objective import Init, Outputs, Start, Student, TrainingPhase


class CrossEntropy:
    """Training from scratch by the labels alone: no teacher, nothing copied."""

    student: ClassVar[Student] = "shallower"
    needs_teacher = False
    needs_chain = True
    freezes = False
    branches: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(outputs.logits, outputs.labels)}

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    @classmethod
    def init(cls, recipe: Recipe) -> Init:
        return "scratch"

    @classmethod
    def phases(cls, recipe: Recipe, start: Start) -> list[TrainingPhase]:
        return [TrainingPhase("scratch", recipe.main.model_copy(update={"epochs": recipe.epochs}), cls())]
