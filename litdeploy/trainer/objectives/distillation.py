"""Knowledge distillation."""

from __future__ import annotations

from torch import Tensor

from litdeploy.config.recipe import Recipe
from litdeploy.trainer import kernels
from litdeploy.trainer.objectives.objective import Method, Objective, Outputs, Start, TrainingPhase


def distillation_loss(outputs: Outputs, recipe: Recipe) -> Tensor:
    """L_KD = α · CE(S(x), y) + (1 − α) · τ² · KL(softmax(T(x)/τ) ‖ softmax(S(x)/τ)), the mean over the batch."""
    assert outputs.teacher_logits is not None
    return kernels.distillation_loss(
        outputs.logits, outputs.teacher_logits, outputs.labels, recipe.alpha, recipe.temperature
    )


class Distillation(Objective, Method):
    """Knowledge distillation by the logits alone (Hinton et al., 2015): the whole student learns by L_KD."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"loss": distillation_loss(outputs, self.recipe)}

    @classmethod
    def phases(cls, recipe: Recipe, start: Start) -> list[TrainingPhase]:
        return [TrainingPhase("kd", recipe.main.model_copy(update={"epochs": recipe.epochs}), cls(recipe))]
