"""The optimizer of a phase, the schedule of its learning rate, and the defaults of both by the kind of network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from litdeploy.config.recipe import Phase, Recipe
from litdeploy.data import Split
from litdeploy.errors import TrainingError


class _AdamW(torch.optim.AdamW):
    # A step that will be captured first runs a few times outside the graph, about which torch would warn.
    _warned_capturable_if_run_uncaptured = True


def with_optimizer(recipe: Recipe, network: nn.Module, note: Callable[[str], None]) -> Recipe:
    """Fill in what a recipe leaves to the kind of network: the optimizer, its learning rates and weight decay.

    A transformer's gradients differ in size from layer to layer, which SGD's one rate does not suit; measured, SGD at
    the rate of a convolutional network makes it worse than the cut alone. Its layer norms tell it from those, which
    have batch norms; a network with both is what it has more of.
    """
    batch_norms = sum(isinstance(module, _BatchNorm) for module in network.modules())
    layer_norms = sum(_is_layer_norm(module) for module in network.modules())
    filled = recipe.filled("adamw" if layer_norms > batch_norms else "sgd")
    if filled != recipe:
        why = f": the network has {layer_norms} layer norms" if filled.optimiser == "adamw" != recipe.optimiser else ""
        note(
            f"optimizer: {filled.optimiser}, learning rate {filled.main.rate:g}, in the fine-tuning "
            f"{filled.finetune.rate:g}, weight decay {filled.weight_decay:g}{why}"
        )
    return filled


def _is_layer_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm or an RMS norm; transformers writes its own."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def new_optimizer(student: nn.Module, recipe: Recipe, phase: Phase, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the student's parameters that require gradients. The recipe is filled: see `with_optimizer`."""
    assert recipe.weight_decay is not None
    on_cuda = device.type == "cuda"
    # A captured graph has its numbers built in; on CUDA the rate is a tensor, which the fused update reads.
    rate = torch.tensor(phase.rate, device=device) if on_cuda else phase.rate
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
        optimizer, max_lr=phase.rate, total_steps=total + 1, cycle_momentum=False
    )
