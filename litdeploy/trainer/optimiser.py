"""The optimiser of a phase, its schedule, and the number of its steps."""

from __future__ import annotations

import torch

from litdeploy.config.recipe import Phase
from litdeploy.data import Split
from litdeploy.errors import TrainingError
from litdeploy.trainer.objectives import TrainingPhase
from litdeploy.trainer.run import Run


class _AdamW(torch.optim.AdamW):
    # A step that is to be captured runs a few times outside of the graph first, of which torch would warn.
    _warned_capturable_if_run_uncaptured = True


def new_optimiser(run: Run, phase: TrainingPhase) -> torch.optim.Optimizer:
    """Of the parameters that the phase trains."""
    on_cuda = run.device.type == "cuda"
    # A captured graph has its numbers built in: there the learning rate is a tensor, which the fused update reads.
    rate = torch.tensor(phase.settings.learning_rate, device=run.device) if on_cuda else phase.settings.learning_rate
    trained = [parameter for parameter in run.student.parameters() if parameter.requires_grad]
    recipe = run.recipe
    if recipe.optimiser == "adamw":
        return _AdamW(trained, rate, recipe.betas, weight_decay=recipe.weight_decay, fused=on_cuda, capturable=on_cuda)
    return torch.optim.SGD(trained, rate, recipe.momentum, weight_decay=recipe.weight_decay, fused=on_cuda)


def steps_an_epoch(split: Split, batch_size: int) -> int:
    """Whole batches in a split; what is left over is not trained on in that epoch.

    Raises:
        TrainingError: there is none.
    """
    steps = len(split) // batch_size
    if steps == 0:
        raise TrainingError(
            f"the training split is of {len(split)}, fewer than one batch of {batch_size}. "
            f"Give a smaller batch: --batch-size {max(2, len(split) // 4)}"
        )
    return steps


def new_schedule(optimiser: torch.optim.Optimizer, phase: Phase, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The phase's schedule, stepped once a step."""
    if phase.schedule == "step":
        milestones = [epoch * steps for epoch in phase.milestones]
        return torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.1)
    total = max(1, phase.epochs * steps)
    # One more than the steps: the schedule is stepped after the last update too.
    return torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=phase.learning_rate, total_steps=total + 1, cycle_momentum=False
    )
