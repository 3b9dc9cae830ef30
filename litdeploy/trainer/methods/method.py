"""The contract of a method: the student it starts with, and its phases, each with an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import nn

from litdeploy.batch import Batch
from litdeploy.config.recipe import Phase, Recipe
from litdeploy.config.spec import NetworkSpec
from litdeploy.networks import Network, Section
from litdeploy.networks.width import Match
from litdeploy.storage.records import Score
from litdeploy.tasks import Task, task_of
from litdeploy.trainer.functions import Functions
from litdeploy.trainer.objectives import Objective

# How a student starts: with blocks copied from the teacher, new blocks, or new weights throughout (stem and head too).
Init = Literal["copy", "fresh", "scratch"]

# The student's shape: fewer of the teacher's blocks, all of them, or a network of its own.
Student = Literal["shallower", "whole", "own"]


class Training(Protocol):
    """A run, as a transition between two phases sees and changes it. The Trainer is one.

    Attributes:
        student: module under training.
        spec: rebuilds the student in its present shape.
        sections: the student's planned sections, in order.
        example: inputs of a few samples.
        folder: of the run's own files.
        validation: the student's score after the last whole epoch.
    """

    student: nn.Module
    spec: NetworkSpec
    sections: Sequence[Section]
    example: Batch
    folder: Path
    recipe: Recipe

    @property
    def validation(self) -> Score | None: ...

    def note(self, text: str) -> None:
        """Show a line to the user."""

    def on_first_rank(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function on the first rank while the others wait."""

    def teach_with(self, module: nn.Module) -> None:
        """Make a module of the teacher's shape the teacher."""


class Transition(Protocol):
    """What changes between two phases besides the objective: the student's shape or weights, or the teacher.

    Attributes:
        new_teacher: whether it replaces the teacher.
    """

    new_teacher: ClassVar[bool]

    def apply(self, training: Training) -> None:
        """Make the change, before the phase's first step. All ranks have the same student and make the same of it."""

    def restore(self, training: Training) -> None:
        """Redo what a checkpoint does not hold, if a run resumes in or behind the phase. The student and its spec are
        restored already."""


@dataclass(frozen=True)
class TrainingPhase:
    """A phase of the recipe with its objective.

    Attributes:
        transition: from the phase before; None: the student stays unchanged.
    """

    name: str
    settings: Phase
    objective: Objective
    transition: Transition | None = None


@dataclass(frozen=True)
class Start:
    """What a method's phases are built from.

    Attributes:
        sections: names of the student's planned sections, in order.
        matches: each section of a student that is a network of its own, with the teacher's.
        student: its module; None if only the epochs are wanted.
        fresh: seed → a student with new weights where the method's first one had them; None if no phase needs one.
        teacher: the unmodified teacher; None if there is none.
        functions: the user's own loss; None: the task's.
    """

    sections: Sequence[str] = ()
    matches: Sequence[Match] = ()
    student: nn.Module | None = None
    fresh: Callable[[int], nn.Module] | None = None
    teacher: Network | None = None
    functions: Functions | None = None

    @property
    def task(self) -> Task[Any] | Functions:
        """What the outputs mean, or the user's own loss of them."""
        if self.functions is not None and "loss" in self.functions.functions:
            return self.functions
        return task_of(None if self.teacher is None else self.teacher.spec)


def _copy(recipe: Recipe) -> Init:
    return "copy"


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes:
        phases: recipe, start → phases with `recipe.epochs` epochs in all. Raises SettingsError if these are too few.
        student: which student the method has.
        init: how the student starts if the recipe does not say.
        has_teacher: whether any phase learns from a teacher.
    """

    phases: Callable[[Recipe, Start], list[TrainingPhase]]
    student: Student = "shallower"
    init: Callable[[Recipe], Init] = _copy
    has_teacher: bool = True

    def initial(self, recipe: Recipe) -> Init:
        """How the student of a recipe starts."""
        default = self.init(recipe)
        return "scratch" if default == "scratch" else recipe.init or default


def for_all_epochs(recipe: Recipe) -> Phase:
    """The main phase's settings with the epochs of both phases, for a method of one phase."""
    return recipe.main.model_copy(update={"epochs": recipe.epochs})
