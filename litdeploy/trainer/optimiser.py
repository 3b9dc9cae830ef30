"""The optimiser of a phase, its schedule, and the number of its steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from litdeploy.data import Split
from litdeploy.errors import TrainingError
from litdeploy.recipe import Phase
from litdeploy.trainer.objectives import TrainingPhase
from litdeploy.trainer.run import Run

# Of Adam, for generators (Radford et al., "DCGAN", 2016; Choi et al., 2018).
_GENERATORS_BETAS = (0.5, 0.999)


def new_optimiser(run: Run, phase: TrainingPhase) -> torch.optim.Optimizer:
    """Of the parameters that the phase trains."""
    parameters: Iterable[nn.Parameter] = [*run.student.parameters(), *phase.objective.parameters()]
    on_cuda = run.device.type == "cuda"
    # A captured graph has its numbers built in: there the learning rate is a tensor, which the fused update reads.
    rate = torch.tensor(phase.settings.learning_rate, device=run.device) if on_cuda else phase.settings.learning_rate
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if run.recipe.optimiser == "adam":
        return torch.optim.Adam(
            trained, lr=rate, betas=_GENERATORS_BETAS, weight_decay=run.recipe.weight_decay, fused=on_cuda
        )
    return torch.optim.SGD(
        trained,
        lr=rate,
        fused=on_cuda,
        momentum=run.recipe.momentum,
        weight_decay=run.recipe.weight_decay,
    )


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
