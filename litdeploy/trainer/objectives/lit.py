"""LIT."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from litdeploy.config.recipe import Recipe
from litdeploy.trainer import kernels
from litdeploy.trainer.objectives.adversarial import Adversarial, load_discriminator
from litdeploy.trainer.objectives.distillation import Distillation, distillation_loss
from litdeploy.trainer.objectives.objective import Method, Objective, Outputs, Start, TrainingPhase


class Lit(Objective, Method):
    """LIT (Koratana et al., "LIT: Learned Intermediate Representation Training for Model Compression", ICML 2019).

    L = β · L_KD + (1 − β) · w · Σ_i mse(S_i(T_{i−1}), T_i), then fine-tuning by L_KD alone; with a
    discriminator by `Adversarial`, for a generator has no logits: there β is 0.
    """

    freezes = True

    def __init__(self, recipe: Recipe, sections: Sequence[str]) -> None:
        self.recipe = recipe
        self.branches = tuple(sections)

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        recipe = self.recipe
        kd = distillation_loss(outputs, recipe)
        sections = _section_losses(outputs)
        loss = recipe.beta * kd + (1 - recipe.beta) * recipe.section_weight * sections.sum()
        return {"loss": loss, "kd": kd, **_named(sections, outputs)}

    @classmethod
    def phases(cls, recipe: Recipe, start: Start) -> list[TrainingPhase]:
        lit = cls(recipe, start.sections) if recipe.beta else LitSections(recipe, start.sections)
        return [
            TrainingPhase("lit", recipe.main, lit),
            TrainingPhase("finetune", recipe.finetune, _last(recipe, start)),
        ]


def _last(recipe: Recipe, start: Start) -> Distillation | Adversarial:
    """What the whole student is fine-tuned by."""
    if recipe.discriminator is None:
        return Distillation(recipe)
    assert start.teacher is not None
    return Adversarial(recipe, load_discriminator(recipe.discriminator, start.teacher))


class LitSections(Objective):
    """LIT with β = 0: L = w · Σ_i mse(S_i(T_{i−1}), T_i).

    Each term is of one section's parameters only: any part of the sections can be trained without the others, and comes
    out the same. As nothing runs the student's own chain, batch norm's running statistics are estimated afterwards.
    """

    needs_chain = False
    freezes = True
    learns_by = "sections"

    def __init__(self, recipe: Recipe, sections: Sequence[str]) -> None:
        self.recipe = recipe
        self.branches = tuple(sections)

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        sections = _section_losses(outputs)
        return {"loss": self.recipe.section_weight * sections.sum(), **_named(sections, outputs)}

    def only(self, sections: Sequence[str]) -> LitSections:
        """The objective of these sections alone."""
        return LitSections(self.recipe, sections)


def _section_losses(outputs: Outputs) -> Tensor:
    students, teachers = zip(*outputs.branches.values(), strict=True)
    return kernels.section_losses(students, teachers)


def _named(sections: Tensor, outputs: Outputs) -> dict[str, Tensor]:
    return {f"section/{name}": part for name, part in zip(outputs.branches, sections.unbind(), strict=True)}
