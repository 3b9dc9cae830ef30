"""Network slimming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from litdeploy.config.recipe import Recipe, SlimmingSettings
from litdeploy.errors import SettingsError
from litdeploy.networks.network import channels_last
from litdeploy.networks.student import whole_plan
from litdeploy.networks.width import scales_of, slim, widths_of
from litdeploy.trainer.methods.method import Start, Training, TrainingPhase
from litdeploy.trainer.objectives import CrossEntropy, SparseCrossEntropy


def slimming(recipe: Recipe, start: Start) -> list[TrainingPhase]:
    """Network slimming (Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017):
    train the whole network with a penalty on its batch norm scales, remove the channels with the smallest ones, and
    fine-tune the rest by the labels.
    """
    settings = recipe.slimming or SlimmingSettings()
    if recipe.epochs < 2:
        raise SettingsError(
            "1 epoch: method 'slimming' needs one before channels are removed and one after. Give --epochs 2"
        )
    after = min(max(1, recipe.finetune.epochs), recipe.epochs - 1)
    before = recipe.main.model_copy(update={"epochs": recipe.epochs - after})
    scales = [] if start.student is None else scales_of(start.student)
    return [
        TrainingPhase("sparse", before, SparseCrossEntropy(settings.sparsity, scales)),
        TrainingPhase(
            "finetune",
            recipe.finetune.model_copy(update={"epochs": after}),
            CrossEntropy(),
            transition=Removal(settings.prune_ratio),
        ),
    ]


@dataclass(frozen=True)
class Removal:
    """Remove channels from the student and record the remaining widths in its spec."""

    new_teacher: ClassVar[bool] = False

    ratio: float

    def apply(self, training: Training) -> None:
        student = training.student
        before = sum(parameter.numel() for parameter in student.parameters())
        wide = {name: tuple(value.shape) for name, value in student.state_dict().items()}
        student.requires_grad_(True)
        assert isinstance(training.example, Tensor)  # networks with several inputs do not learn by logits
        slimmed = slim(student, training.example, self.ratio)
        channels_last(student)
        plan = whole_plan(training.sections)
        training.spec = training.spec.with_(plan=plan, widths=widths_of(student, wide))
        after = sum(parameter.numel() for parameter in student.parameters())
        training.note(
            f"slimming: {slimmed.removed} of {slimmed.channels} channels removed; {before:,} → {after:,} parameters"
            + (f". {', '.join(slimmed.fixed)}: channels stay (padded, or in groups)" if slimmed.fixed else "")
        )

    def restore(self, training: Training) -> None:
        """The restored spec has the widths."""
