"""Selection: which of a run's weights are delivered, and what the user is warned of.

A student may be better before its last step than after it, even before its first: few images, or a learning rate too
high, spoil good blocks. So the student is measured on the validation split before its first step (the cut alone) and
after each epoch, and the best is delivered; of equal ones the latest. The test split has no say in it.

Candidates are students of the delivered shape: those since the last transition between two phases, such as the removal
of channels. A student that starts with new weights has no cut to measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from litdeploy.config.recipe import Recipe
from litdeploy.data import Data
from litdeploy.storage.records import Score
from litdeploy.tasks.task import Task
from litdeploy.trainer.methods import METHODS, TrainingPhase
from litdeploy.trainer.optimizer import steps_per_epoch
from litdeploy.trainer.resume import Position, cloned

# With fewer updates in an epoch the student hardly learns.
_FEW_STEPS = 5
_PREFIX = "best/"


class Selection:
    """The best student of a run so far. Its weights are on the CPU, on the first rank.

    Args:
        task: compares the scores.
        recipe: whether to keep the best or the last.
        phases: of the run.
        position: receives the scores of the cut and of the best.

    Attributes:
        cut_epoch: whole epochs before the phase at whose beginning the student has the delivered shape.
    """

    def __init__(self, task: Task[Score], recipe: Recipe, phases: Sequence[TrainingPhase], position: Position) -> None:
        self._task = task
        self._position = position
        self._weights: dict[str, Tensor] = {}
        # A phase that learns what the score does not measure ends where its last step leaves it.
        self._keeps = recipe.keep == "best" and all(phase.objective.scored for phase in phases[-1:])
        self._since = max((number for number, phase in enumerate(phases) if phase.transition is not None), default=0)
        self.cut_epoch = sum(phase.settings.epochs for phase in phases[: self._since])
        self._from_teacher = METHODS[recipe.method].initial(recipe) == "copy"

    @property
    def cut_is_next(self) -> bool:
        """Whether it is time to measure the cut."""
        at = self._position
        begins = (at.phase, at.epoch, at.step) == (self._since, 0, 0)
        return begins and self._from_teacher and at.cut is None

    def offer(self, student: nn.Module, score: Score) -> None:
        """Keep a student between two epochs if it is the best so far, of equal ones the later."""
        best = self._position.best
        wanted = self._keeps and self._position.phase >= self._since
        if wanted and (best is None or self._key(score) >= self._key(best)):
            self._position.best, self._position.best_epoch = score, self._position.epochs_done
            self._weights = cloned(student.state_dict())

    @torch.no_grad()
    def deliver(self, student: nn.Module, note: Callable[[str], None]) -> Score | None:
        """Give the student the best weights, if any were kept. Return its score on validation."""
        position = self._position
        if self._weights:
            for name, tensor in student.state_dict().items():
                tensor.copy_(self._weights[name])
            position.validation = position.best
            if position.best_epoch not in (position.epochs_done, self.cut_epoch):  # of the cut the user is warned
                note(
                    f"the best on validation is delivered: after epoch {position.best_epoch} of {position.epochs_done}"
                )
        return position.validation

    def tensors(self) -> dict[str, Tensor]:
        """The best weights, as a checkpoint holds them."""
        return {f"{_PREFIX}{name}": value for name, value in self._weights.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned; nothing if an older checkpoint has none."""
        own = {name: value for name, value in tensors.items() if name.startswith(_PREFIX)}
        self._weights = {name.removeprefix(_PREFIX): value for name, value in own.items()}

    @property
    def delivered(self) -> int:
        """The whole epochs after which the delivered student had its weights."""
        return self._position.epochs_done if self._position.best_epoch is None else self._position.best_epoch

    def warnings(self, recipe: Recipe, data: Data, teacher: Score | None) -> tuple[str, ...]:
        """What the user should know about the delivered student.

        Args:
            teacher: its score on validation; None if it has none.
        """
        position, task, classes = self._position, self._task, len(data.classes)
        steps = steps_per_epoch(data.train, recipe.batch_size)
        slower, longer = f"--learning-rate {recipe.main.rate / 3:.2g}", f"--epochs {2 * recipe.epochs}"
        advice = f"Try a lower learning rate ({slower}), more epochs ({longer}), or more data."
        found = []
        student, cut = position.validation, position.cut
        if student is not None and cut is not None:
            if position.best is not None and position.best_epoch == self.cut_epoch:
                found.append(
                    f"no epoch made the student better than the cut alone ({cut.summary()}), which is kept. {advice}"
                )
            elif self._key(student) < self._key(cut):
                found.append(
                    f"the student ends below the cut alone: {student.summary()} on validation, and {cut.summary()} "
                    f"before its first step. {advice}"
                )
        chance = task.chance(student, classes) if student is not None and classes else None
        if student is not None and chance is not None and (teacher is None or task.chance(teacher, classes) is None):
            taught = "" if teacher is None else f", and its teacher reaches {teacher.summary()}"
            found.append(
                f"the student ends hardly better than guessing ({chance:.0%}): {student.summary()} on "
                f"validation{taught}. {advice}"
            )
        if steps < _FEW_STEPS:
            found.append(
                f"an epoch has only {steps} steps of {recipe.batch_size}. Give more data, more epochs, or a smaller "
                f"batch: --batch-size {max(2, recipe.batch_size // 4)}"
            )
        return tuple(found)

    def _key(self, score: Score) -> float:
        key = self._task.key(score)
        return -math.inf if math.isnan(key) else key


@contextmanager
def unchanged(student: nn.Module) -> Iterator[None]:
    """Restore the student's buffers and the random generators of its device afterwards: no step sees a difference."""
    before = [(buffer, buffer.clone()) for buffer in student.buffers()]
    with torch.random.fork_rng({each.device for each in student.parameters() if each.device.type == "cuda"}):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)
