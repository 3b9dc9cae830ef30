"""Knowledge distillation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor, nn

from litdeploy.recipe import Recipe
from litdeploy.trainer import kernels
from litdeploy.trainer.objectives.objective import Init, Outputs, Start, Student, TrainingPhase


def distillation_loss(outputs: Outputs, recipe: Recipe) -> Tensor:
    """L_KD = α · CE(S(x), y) + (1 − α) · τ² · KL(softmax(T(x)/τ) ‖ softmax(S(x)/τ)), the mean over the batch."""
    assert outputs.teacher_logits is not None
    return kernels.distillation_loss(
        outputs.logits, outputs.teacher_logits, outputs.labels, recipe.alpha, recipe.temperature
    )


class Distillation:
    """Knowledge distillation by the logits alone (Hinton et al., 2015): the whole student learns by L_KD."""

    student: ClassVar[Student] = "shallower"
    needs_teacher = True
    needs_chain = True
    freezes = False
    branches: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"loss": distillation_loss(outputs, self.recipe)}

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    @classmethod
    def init(cls, recipe: Recipe) -> Init:
        return "copy"

    @classmethod
    def phases(cls, recipe: Recipe, start: Start) -> list[TrainingPhase]:
        return [TrainingPhase("kd", recipe.main.model_copy(update={"epochs": recipe.epochs}), cls(recipe))]
