"""Born-again networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from litdeploy.config.recipe import BornAgainSettings, Recipe
from litdeploy.errors import SettingsError
from litdeploy.networks.sections import container
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.trainer.objectives.distillation import Distillation
from litdeploy.trainer.objectives.lit import Lit
from litdeploy.trainer.objectives.objective import Init, Method, Start, Student, TrainingPhase
from litdeploy.trainer.teacher import successor

if TYPE_CHECKING:
    from litdeploy.trainer.run import Run

_LEARNS_BY: dict[str, type[Method]] = {"kd": Distillation, "lit": Lit}


class BornAgain(Method):
    """Born-again networks (Furlanello et al., "Born-Again Neural Networks", ICML 2018): each generation has the
    teacher's shape and new weights, and learns from the one before.

    By `kd` as published: the whole network is new. By `lit` the blocks are, and stem and head those of the generation
    before. The recipe's epochs are shared out among the generations.
    """

    student: ClassVar[Student] = "whole"

    @classmethod
    def init(cls, recipe: Recipe) -> Init:
        return "scratch" if _settings(recipe).by == "kd" else "fresh"

    @classmethod
    def phases(cls, recipe: Recipe, start: Start) -> list[TrainingPhase]:
        settings = _settings(recipe)
        each, left = divmod(recipe.epochs, settings.generations)
        if not each:
            raise SettingsError(
                f"{recipe.epochs} epochs for {settings.generations} generations: each needs one at the least. Give "
                f"--epochs {settings.generations}, or --generations {recipe.epochs}"
            )
        phases: list[TrainingPhase] = []
        for generation in range(settings.generations):
            share = recipe.with_epochs(each + (generation < left))
            own = [phase for phase in _LEARNS_BY[settings.by].phases(share, start) if phase.settings.epochs]
            if generation:
                own[0] = replace(own[0], transition=Succession(generation, settings.by == "kd", start.fresh))
            phases += [replace(phase, name=f"{phase.name}-{generation + 1}") for phase in own]
        return phases


@dataclass(frozen=True)
class Succession:
    """The student that was trained becomes the teacher, and one with new weights takes its place.

    Attributes:
        ended: number of the generation that teaches from now on; the first is 1.
        whole: whether stem and head are new too.
        fresh: see `Start`.
    """

    new_teacher: ClassVar[bool] = True

    ended: int
    whole: bool
    fresh: Callable[[int], nn.Module] | None

    def apply(self, run: Run) -> None:
        assert run.position.validation is not None
        assert self.fresh is not None
        run.ranks.on_first(self._keep, run)
        found = run.position.validation.summary()
        run.progress.note(f"generation {self.ended}: {found} on validation; it teaches the next one")
        self._teach(run, run.student)
        new = self.fresh(run.recipe.seed + self.ended)
        if self.whole:
            run.student.load_state_dict(new.state_dict())
        else:
            for name in run.sections:
                container(run.student, name).load_state_dict(container(new, name).state_dict())

    def restore(self, run: Run) -> None:
        self._teach(run, successor(run.student, self._path(run), run.spec.name))

    def _keep(self, run: Run) -> None:
        write_checkpoint(self._path(run), run.student.state_dict(), run.spec)

    def _path(self, run: Run) -> Path:
        return run.folder / "generations" / f"{self.ended}.safetensors"

    @staticmethod
    def _teach(run: Run, module: nn.Module) -> None:
        assert run.teacher is not None
        run.teacher = run.teacher.of(module)
        run.cache = None if run.cache is None else run.cache.emptied()


def _settings(recipe: Recipe) -> BornAgainSettings:
    return recipe.born_again or BornAgainSettings()
