"""InDistill."""

from __future__ import annotations

from litdeploy.config.recipe import InDistillSettings, Recipe
from litdeploy.errors import SettingsError
from litdeploy.trainer.methods.method import Start, TrainingPhase
from litdeploy.trainer.objectives import Distillation, Layer, Objective, ProbabilisticTransfer

# Epochs of the first layer to those of the next ones: 3 : 4 : 5, as in the authors' code.
_FIRST = 3


def indistill(recipe: Recipe, start: Start) -> list[TrainingPhase]:
    """InDistill (Sarridis et al., "InDistill: Information flow-preserving knowledge distillation for model
    compression", WACV 2025): a narrower student learns the teacher's strongest channels, one layer after the other and
    each for longer than the one before; then by L_KD or PKT.
    """
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
        Distillation(recipe, start.task)
        if settings.then == "kd"
        else ProbabilisticTransfer(start.matches[-1].student, settings.pkt_weight, settings.label_weight)
    )
    return [*phases, TrainingPhase(settings.then, last, objective)]


def growing(epochs: int, layers: int) -> list[int]:
    """Share epochs among layers, more to the later ones; each gets at least one if there are enough.

    >>> growing(12, 3)
    [3, 4, 5]
    """
    weights = [_FIRST + layer for layer in range(layers)]
    ends = [round(epochs * sum(weights[: layer + 1]) / sum(weights)) for layer in range(layers)]
    return sorted(max(1, end - before) for end, before in zip(ends, [0, *ends], strict=False))
