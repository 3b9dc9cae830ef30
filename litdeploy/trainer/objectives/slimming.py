"""Network slimming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdeploy.config.recipe import Recipe, SlimmingSettings
from litdeploy.errors import SettingsError
from litdeploy.networks.sections import container
from litdeploy.networks.width import scales_of, slim, widths_of
from litdeploy.trainer.objectives.cross_entropy import CrossEntropy
from litdeploy.trainer.objectives.objective import Method, Objective, Outputs, Start, Student, TrainingPhase

if TYPE_CHECKING:
    from litdeploy.trainer.run import Run


class Slimming(Objective, Method):
    """Network slimming (Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017):
    the whole network trains with a penalty on its batch norm scales, the channels with the smallest ones are removed,
    and what is left is fine-tuned by the labels.

    L = CE(S(x), y) + s · Σ |γ|, over all channels of all batch norms; then CE alone.
    """

    student: ClassVar[Student] = "whole"
    needs_teacher = False

    def __init__(self, sparsity: float, scales: Sequence[nn.Parameter]) -> None:
        self._sparsity = sparsity
        self._scales = scales

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        labels = F.cross_entropy(outputs.logits, outputs.labels)
        scales = torch.cat([scale.float() for scale in self._scales]).abs().sum()
        return {"loss": labels + self._sparsity * scales, "labels": labels, "scales": scales}

    @classmethod
    def phases(cls, recipe: Recipe, start: Start) -> list[TrainingPhase]:
        settings = recipe.slimming or SlimmingSettings()
        if recipe.epochs < 2:
            raise SettingsError(
                "1 epoch: method 'slimming' needs one before channels are removed and one after. Give --epochs 2"
            )
        after = min(max(1, recipe.finetune.epochs), recipe.epochs - 1)
        before = recipe.main.model_copy(update={"epochs": recipe.epochs - after})
        scales = [] if start.student is None else scales_of(start.student)
        return [
            TrainingPhase("sparse", before, cls(settings.sparsity, scales)),
            TrainingPhase(
                "finetune",
                recipe.finetune.model_copy(update={"epochs": after}),
                CrossEntropy(),
                transition=Removal(settings.prune_ratio),
            ),
        ]


@dataclass(frozen=True)
class Removal:
    """Takes channels out of the student and enters in its spec what is left."""

    new_teacher: ClassVar[bool] = False

    ratio: float

    def apply(self, run: Run) -> None:
        before = sum(parameter.numel() for parameter in run.student.parameters())
        wide = {name: tuple(value.shape) for name, value in run.student.state_dict().items()}
        run.student.requires_grad_(True)
        assert isinstance(run.example, Tensor)  # networks of several inputs make images: see `check_fits`
        slimmed = slim(run.student, run.example, self.ratio)
        run.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        plan = {name: tuple(range(len(container(run.student, name)))) for name in run.sections}
        run.spec = run.spec.with_(plan=plan, widths=widths_of(run.student, wide))
        after = sum(parameter.numel() for parameter in run.student.parameters())
        run.progress.note(
            f"slimming: {slimmed.removed} of {slimmed.channels} channels removed; {before:,} → {after:,} parameters"
            + (f". {', '.join(slimmed.fixed)}: channels stay (padded, or in groups)" if slimmed.fixed else "")
        )

    def restore(self, run: Run) -> None:
        """The spec tells the widths."""
