"""The loss of LIT (Koratana et al., "LIT: Learned Intermediate Representation Training for Model Compression", ICML
2019).

    L = β · L_KD + (1 − β) · w · Σ_i mse(S_i(T_{i−1}), T_i)

Each student section S_i runs on the teacher's output of the section before, T_{i−1}, and not on the student's own: it
learns one short piece of the teacher, undisturbed by errors of the sections in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from litdeploy.config.recipe import Recipe
from litdeploy.tasks import Task, task_of
from litdeploy.trainer import kernels
from litdeploy.trainer.functions import Functions
from litdeploy.trainer.objectives.logits import distillation_loss
from litdeploy.trainer.objectives.objective import Objective, Outputs


class Lit(Objective):
    """LIT with β > 0: the student's own chain learns by L_KD, and each section by the teacher's tensors."""

    freezes = True
    learns_by = "output"

    def __init__(self, recipe: Recipe, sections: Sequence[str], task: Task[Any] | Functions | None = None) -> None:
        self.recipe = recipe
        self._kd = distillation_loss(recipe, task or task_of(None))
        self.branches = tuple(sections)

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        recipe = self.recipe
        kd = self._kd(outputs)
        sections = _section_losses(outputs)
        loss = recipe.beta * kd + (1 - recipe.beta) * recipe.section_weight * sections.sum()
        return {"loss": loss, "kd": kd, **_by_name(sections, outputs)}


class LitSections(Objective):
    """LIT with β = 0: L = w · Σ_i mse(S_i(T_{i−1}), T_i).

    Each term depends on one section's parameters only, so any subset of the sections can be trained without the others,
    with the same result. No step runs the student's own chain; batch norm's running statistics are estimated afterwards
    (`batch_norm.estimate_statistics`).
    """

    needs_chain = False
    freezes = True
    learns_by = "sections"

    def __init__(self, recipe: Recipe, sections: Sequence[str]) -> None:
        self.recipe = recipe
        self.branches = tuple(sections)

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        sections = _section_losses(outputs)
        return {"loss": self.recipe.section_weight * sections.sum(), **_by_name(sections, outputs)}

    def only(self, sections: Sequence[str]) -> LitSections:
        """The objective of these sections alone."""
        return LitSections(self.recipe, sections)


def _section_losses(outputs: Outputs) -> Tensor:
    students, teachers = zip(*outputs.branches.values(), strict=True)
    return kernels.section_losses(students, teachers)


def _by_name(sections: Tensor, outputs: Outputs) -> dict[str, Tensor]:
    return {f"section/{name}": part for name, part in zip(outputs.branches, sections.unbind(), strict=True)}
