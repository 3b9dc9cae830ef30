"""Born-again networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch import nn

from litdeploy.config.recipe import BornAgainSettings, Recipe
from litdeploy.errors import SettingsError
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.trainer.methods.method import Init, Start, Training, TrainingPhase
from litdeploy.trainer.methods.plain import kd, lit
from litdeploy.trainer.teacher import load_student


def born_again(recipe: Recipe, start: Start) -> list[TrainingPhase]:
    """Born-again networks (Furlanello et al., "Born-Again Neural Networks", ICML 2018): each generation has the
    teacher's shape and new weights, and learns from the one before.

    By `kd`, as published, the whole network is new. By `lit` the blocks are new, and stem and head are those of the
    generation before. The generations share the recipe's epochs.
    """
    settings = _settings(recipe)
    each, left = divmod(recipe.epochs, settings.generations)
    if not each:
        raise SettingsError(
            f"{recipe.epochs} epochs for {settings.generations} generations: each needs at least one. Give "
            f"--epochs {settings.generations}, or --generations {recipe.epochs}"
        )
    phases: list[TrainingPhase] = []
    for generation in range(settings.generations):
        share = recipe.with_epochs(each + (generation < left))
        method = {"kd": kd, "lit": lit}[settings.by]
        own = [phase for phase in method(share, start) if phase.settings.epochs]
        if generation:
            own[0] = replace(own[0], transition=Succession(generation, settings.by == "kd", start.fresh))
        phases += [replace(phase, name=f"{phase.name}-{generation + 1}") for phase in own]
    return phases


def born_again_init(recipe: Recipe) -> Init:
    return "scratch" if _settings(recipe).by == "kd" else "fresh"


def _settings(recipe: Recipe) -> BornAgainSettings:
    return recipe.born_again or BornAgainSettings()


@dataclass(frozen=True)
class Succession:
    """The trained student becomes the teacher, and a student with new weights takes its place.

    Attributes:
        ended: number of the generation that teaches from now on; the first is 1.
        whole: whether stem and head are new too.
        fresh: see `Start`.
    """

    new_teacher: ClassVar[bool] = True

    ended: int
    whole: bool
    fresh: Callable[[int], nn.Module] | None

    def apply(self, training: Training) -> None:
        assert training.validation is not None
        assert self.fresh is not None
        path, student = self._path(training), training.student
        training.on_first_rank(write_checkpoint, path, student.state_dict(), training.spec)
        training.note(
            f"generation {self.ended}: {training.validation.summary()} on validation; it teaches the next one"
        )
        training.teach_with(student)
        new = self.fresh(training.recipe.seed + self.ended)
        if self.whole:
            student.load_state_dict(new.state_dict())
        else:
            for section in training.sections:
                for old, block in zip(section.blocks_in(student), section.blocks_in(new), strict=True):
                    old.load_state_dict(block.state_dict())

    def restore(self, training: Training) -> None:
        training.teach_with(load_student(training.student, self._path(training), training.spec.name))

    def _path(self, training: Training) -> Path:
        return training.folder / "generations" / f"{self.ended}.safetensors"
