"""What a method consists of: the student that it starts with, and phases, each with its objective.

What a run goes through is told by its phases alone, and its state by the student's module and spec, the optimiser and
the phase that it is in: it can go on from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from torch import Tensor, nn

from litdeploy.batch import Batch
from litdeploy.config.recipe import Phase, Recipe
from litdeploy.networks.width import Match
from litdeploy.tasks import task_of

if TYPE_CHECKING:
    from litdeploy.networks import Network
    from litdeploy.trainer.run import Run

# How a method's student starts: blocks copied, blocks new, or everything new (stem and head too).
Init = Literal["copy", "fresh", "scratch"]

# Which student a method has: one with fewer of the teacher's blocks, one with all of them, or a network of its own.
Student = Literal["shallower", "whole", "own"]


@dataclass(frozen=True)
class Outputs:
    """What one step computed.

    Attributes:
        logits: of the student's own chain, (N, classes), float32; what a generator makes, (N, C, H, W). Empty where the
            objective needs no chain.
        labels: (N,), int64; of attributes (N, K).
        teacher_logits: (N, classes), float32; None where the objective needs no teacher.
        branches: section → (S_i(T_{i−1}), T_i): the student's section on the teacher's input, the teacher's output.
        chain: section → (the student's output in its own chain, the teacher's).
        inputs: what the student was given.
        again: runs the student's own chain once more, on something else.
    """

    logits: Tensor
    labels: Tensor
    teacher_logits: Tensor | None = None
    branches: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    chain: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    inputs: Batch | None = None
    again: Callable[[Batch], Tensor] | None = None


class Objective(ABC):
    """What a step must compute, and the loss of it. What is said here holds where a class says nothing else.

    Attributes:
        needs_teacher: whether the teacher runs at all.
        needs_chain: whether the student's own chain runs.
        freezes: whether all but the planned sections stays as it is, in eval mode.
        branches: sections that run on the teacher's input.
        chain: sections whose output in the student's own chain is compared.
        learns_by: what of; see `check_fits`.
    """

    needs_teacher: bool = True
    needs_chain: bool = True
    freezes: bool = False
    branches: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()
    learns_by: Literal["logits", "images", "sections"] = "logits"

    @abstractmethod
    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        """Scalars by name in float32; `loss` is the one that is minimised, the others are its parts."""


class Transition(Protocol):
    """What changes between two phases besides the objective: the student's shape or weights, or who teaches.

    Attributes:
        new_teacher: whether another one teaches from then on.
    """

    new_teacher: ClassVar[bool]

    def apply(self, run: Run) -> None:
        """Before the phase's first step. On several ranks, each has the same student and makes the same of it."""

    def restore(self, run: Run) -> None:
        """In place of `apply`, where a run goes on in or behind the phase: whose student and spec are there already."""


@dataclass(frozen=True)
class TrainingPhase:
    """A phase of the recipe with the objective that it trains by.

    Attributes:
        transition: from the phase before; None: the next one goes on with the student as it is.
    """

    name: str
    settings: Phase
    objective: Objective
    transition: Transition | None = None


@dataclass(frozen=True)
class Start:
    """What a method's phases are made of.

    Attributes:
        sections: names of the student's planned sections, in the order they run in.
        matches: for a student that is a network of its own, each of its sections with the teacher's.
        student: its module; None where only epochs are asked for.
        fresh: seed → a student with new weights where the method's first one had them; None where no phase asks.
        teacher: as it was given; None where there is none.
    """

    sections: Sequence[str] = ()
    matches: Sequence[Match] = ()
    student: nn.Module | None = None
    fresh: Callable[[int], nn.Module] | None = None
    teacher: Network | None = None


class Method(ABC):
    """A row of the table: a class that says how its method starts and goes on.

    Attributes:
        student: which student it has.
    """

    student: ClassVar[Student] = "shallower"

    @classmethod
    def init(cls, recipe: Recipe) -> Init:
        """How its student starts, where the recipe does not say."""
        return "copy"

    @classmethod
    @abstractmethod
    def phases(cls, recipe: Recipe, start: Start) -> list[TrainingPhase]:
        """Its phases: of `recipe.epochs` epochs together.

        Raises:
            SettingsError: these are too few, or not as the method needs them.
        """


def check_fits(phases: Sequence[TrainingPhase], teacher: Network, method: str) -> None:
    """Holds what the objectives learn by (`logits` of classes, `images`, `sections`) against what the network makes.

    Raises:
        StudentError: one learns by something else.
    """
    for phase in phases:
        if phase.settings.epochs:
            what = f"--method {method}: its phase '{phase.name}'"
            task_of(teacher.spec).check_objective(phase.objective.learns_by, what, teacher.spec.name)
