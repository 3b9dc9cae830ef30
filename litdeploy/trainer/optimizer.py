"""The optimizer of a phase and the schedule of its learning rate."""

from __future__ import annotations

import torch
from torch import nn

from litdeploy.config.recipe import Phase, Recipe
from litdeploy.data import Split
from litdeploy.errors import TrainingError


class _AdamW(torch.optim.AdamW):
    # A step that will be captured first runs a few times outside the graph, about which torch would warn.
    _warned_capturable_if_run_uncaptured = True


def new_optimizer(student: nn.Module, recipe: Recipe, phase: Phase, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the student's parameters that require gradients."""
    on_cuda = device.type == "cuda"
    # A captured graph has its numbers built in; on CUDA the rate is a tensor, which the fused update reads.
    rate = torch.tensor(phase.learning_rate, device=device) if on_cuda else phase.learning_rate
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if recipe.optimiser == "adamw":
        return _AdamW(trained, rate, recipe.betas, weight_decay=recipe.weight_decay, fused=on_cuda, capturable=on_cuda)
    return torch.optim.SGD(trained, rate, recipe.momentum, weight_decay=recipe.weight_decay, fused=on_cuda)


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Whole batches in a split; an epoch skips the rest.

    Raises:
        TrainingError: there is none.
    """
    steps = len(split) // batch_size
    if steps == 0:
        raise TrainingError(
            f"the training split has {len(split)} samples, fewer than one batch of {batch_size}. "
            f"Give a smaller batch: --batch-size {max(2, len(split) // 4)}"
        )
    return steps


def new_schedule(optimizer: torch.optim.Optimizer, phase: Phase, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The phase's learning rate schedule, stepped once a step."""
    if phase.schedule == "step":
        milestones = [epoch * steps for epoch in phase.milestones]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    total = max(1, phase.epochs * steps)
    # One more than the steps: the schedule is stepped after the last update too.
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=phase.learning_rate, total_steps=total + 1, cycle_momentum=False
    )
