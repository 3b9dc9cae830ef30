"""LIT, distillation, hint training and training from scratch: one or two phases without a transition."""

from __future__ import annotations

from litdeploy.config.recipe import Recipe
from litdeploy.trainer.methods.method import Start, TrainingPhase, for_all_epochs
from litdeploy.trainer.objectives import Adversarial, CrossEntropy, Distillation, Hint, Lit, LitSections, Objective
from litdeploy.trainer.objectives.adversarial import load_discriminator


def lit(recipe: Recipe, start: Start) -> list[TrainingPhase]:
    """LIT, then fine-tuning of the whole student: by L_KD, or against a discriminator if the recipe names one."""
    sections = Lit(recipe, start.sections, start.task) if recipe.beta else LitSections(recipe, start.sections)
    last: Objective = Distillation(recipe, start.task)
    if recipe.discriminator is not None:
        assert start.teacher is not None
        last = Adversarial(recipe, load_discriminator(recipe.discriminator, start.teacher))
    return [
        TrainingPhase("lit", recipe.main, sections),
        TrainingPhase("finetune", recipe.finetune, last),
    ]


def kd(recipe: Recipe, start: Start) -> list[TrainingPhase]:
    """Knowledge distillation by logits alone."""
    return [TrainingPhase("kd", for_all_epochs(recipe), Distillation(recipe, start.task))]


def hint(recipe: Recipe, start: Start) -> list[TrainingPhase]:
    """A hint for `hint_share` of the epochs, then distillation."""
    epochs = round(recipe.epochs * recipe.hint_share)
    guided = recipe.main.model_copy(update={"epochs": epochs})
    distilled = recipe.main.model_copy(update={"epochs": recipe.epochs - epochs})
    return [
        TrainingPhase("hint", guided, Hint(start.sections)),
        TrainingPhase("kd", distilled, Distillation(recipe, start.task)),
    ]


def scratch(recipe: Recipe, start: Start) -> list[TrainingPhase]:
    """Training from new weights by the labels alone."""
    return [TrainingPhase("scratch", for_all_epochs(recipe), CrossEntropy())]
