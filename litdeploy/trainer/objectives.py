"""What the student learns by: LIT, and the methods that it is measured against.

An objective says what it needs of a step (`Objective`), turns a step's `Outputs` into losses, and says in which phases
its method trains. Adding one is a class here and a row in `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from litdeploy.recipe import Phase, Recipe
from litdeploy.trainer import kernels


@dataclass(frozen=True)
class Outputs:
    """What one step computed.

    Attributes:
        logits: of the student's own chain, (N, classes), float32; empty where the objective needs no chain.
        labels: (N,), int64.
        teacher_logits: (N, classes), float32; None where the objective needs no teacher.
        branches: section → (S_i(T_{i−1}), T_i): the student's section on the teacher's input, the teacher's output.
        chain: section → (the student's output in its own chain, the teacher's).
    """

    logits: Tensor
    labels: Tensor
    teacher_logits: Tensor | None = None
    branches: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    chain: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective(Protocol):
    """What a step must compute, and the loss of it.

    Attributes:
        needs_teacher: whether the teacher runs at all.
        needs_chain: whether the student's own chain runs.
        freezes: whether all but the planned sections stays as it is, in eval mode.
        branches: sections that run on the teacher's input.
        chain: sections whose output in the student's own chain is compared.
    """

    needs_teacher: bool
    needs_chain: bool
    freezes: bool
    branches: tuple[str, ...]
    chain: tuple[str, ...]

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        """Scalars by name in float32; `loss` is the one that is minimised, the others are its parts."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the objective's own that are trained beside the student's."""


@dataclass(frozen=True)
class TrainingPhase:
    """A phase of the recipe with the objective that it trains by."""

    name: str
    settings: Phase
    objective: Objective


def _distillation_loss(outputs: Outputs, recipe: Recipe) -> Tensor:
    assert outputs.teacher_logits is not None
    return kernels.distillation_loss(
        outputs.logits, outputs.teacher_logits, outputs.labels, recipe.alpha, recipe.temperature
    )


class Lit:
    """LIT (Koratana et al., "LIT: Learned Intermediate Representation Training for Model Compression", ICML 2019).

    L = β · L_KD + (1 − β) · w · Σ_i mse(S_i(T_{i−1}), T_i), then fine-tuning by L_KD alone.
    """

    init: ClassVar[Init] = "copy"
    needs_teacher = True
    needs_chain = True
    freezes = True
    chain: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe, sections: Sequence[str]) -> None:
        self.recipe = recipe
        self.branches = tuple(sections)

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        recipe = self.recipe
        kd = _distillation_loss(outputs, recipe)
        sections = _section_losses(outputs)
        loss = recipe.beta * kd + (1 - recipe.beta) * recipe.section_weight * sections.sum()
        return {"loss": loss, "kd": kd, **_named(sections, outputs)}

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    @classmethod
    def phases(cls, recipe: Recipe, sections: Sequence[str]) -> list[TrainingPhase]:
        return [
            TrainingPhase("lit", recipe.main, cls(recipe, sections) if recipe.beta else LitSections(recipe, sections)),
            TrainingPhase("finetune", recipe.finetune, Distillation(recipe)),
        ]


class LitSections:
    """LIT with β = 0: L = w · Σ_i mse(S_i(T_{i−1}), T_i).

    Each term is of one section's parameters only: any part of the sections can be trained without the others, and comes
    out the same. As nothing runs the student's own chain, batch norm's running statistics are estimated afterwards.
    """

    needs_teacher = True
    needs_chain = False
    freezes = True
    chain: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe, sections: Sequence[str]) -> None:
        self.recipe = recipe
        self.branches = tuple(sections)

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        sections = _section_losses(outputs)
        return {"loss": self.recipe.section_weight * sections.sum(), **_named(sections, outputs)}

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def only(self, sections: Sequence[str]) -> LitSections:
        """The objective of these sections alone."""
        return LitSections(self.recipe, sections)


def _section_losses(outputs: Outputs) -> Tensor:
    students, teachers = zip(*outputs.branches.values(), strict=True)
    return kernels.section_losses(students, teachers)


def _named(sections: Tensor, outputs: Outputs) -> dict[str, Tensor]:
    return {f"section/{name}": part for name, part in zip(outputs.branches, sections.unbind(), strict=True)}


class Distillation:
    """Knowledge distillation by the logits alone (Hinton et al., 2015): the whole student learns by L_KD."""

    init: ClassVar[Init] = "copy"
    needs_teacher = True
    needs_chain = True
    freezes = False
    branches: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"loss": _distillation_loss(outputs, self.recipe)}

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    @classmethod
    def phases(cls, recipe: Recipe, sections: Sequence[str]) -> list[TrainingPhase]:
        return [TrainingPhase("kd", recipe.main.model_copy(update={"epochs": recipe.epochs}), cls(recipe))]


class Hint:
    """One hint, then distillation (Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015).

    The student's output of its middle section, in its own chain and through a 1×1 regressor where the widths differ, is
    drawn to the teacher's: ½ · mse. Nothing behind that section is trained meanwhile.
    """

    init: ClassVar[Init] = "copy"
    needs_teacher = True
    needs_chain = True
    freezes = False
    branches: tuple[str, ...] = ()

    def __init__(self, sections: Sequence[str], regressor: nn.Module | None = None) -> None:
        self.chain: tuple[str, ...] = (sections[(len(sections) - 1) // 2],)
        self.regressor = regressor or nn.Identity()

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        student, teacher = outputs.chain[self.chain[0]]
        return {"loss": 0.5 * F.mse_loss(self.regressor(student).float(), teacher.float())}

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.regressor.parameters()

    @classmethod
    def phases(cls, recipe: Recipe, sections: Sequence[str]) -> list[TrainingPhase]:
        epochs = round(recipe.epochs * recipe.hint_share)
        guided = recipe.main.model_copy(update={"epochs": epochs})
        distilled = recipe.main.model_copy(update={"epochs": recipe.epochs - epochs})
        return [
            TrainingPhase("hint", guided, cls(sections)),
            TrainingPhase("kd", distilled, Distillation(recipe)),
        ]


class CrossEntropy:
    """Training from scratch by the labels alone: no teacher, nothing copied."""

    init: ClassVar[Init] = "scratch"
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
    def phases(cls, recipe: Recipe, sections: Sequence[str]) -> list[TrainingPhase]:
        return [TrainingPhase("scratch", recipe.main.model_copy(update={"epochs": recipe.epochs}), cls())]


# How a method's student starts: blocks copied, blocks new, or everything new (stem and head too).
Init = Literal["copy", "fresh", "scratch"]

OBJECTIVES: dict[str, type[Lit] | type[Distillation] | type[Hint] | type[CrossEntropy]] = {
    "lit": Lit,
    "kd": Distillation,
    "hint": Hint,
    "scratch": CrossEntropy,
}
