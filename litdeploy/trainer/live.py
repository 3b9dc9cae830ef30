"""A phase under way."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from litdeploy.trainer.epoch import Epochs
from litdeploy.trainer.run import Share
from litdeploy.trainer.watch import Watch


@dataclass(frozen=True)
class Live:
    """What changes with the steps of a phase, beside the student."""

    share: Share
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    passes: Epochs
    watch: Watch
