"""A feature cache that was lost with its process, made again: the run's passes once more, the teacher alone."""

from __future__ import annotations

import torch

from litdeploy.trainer.epoch import Epochs
from litdeploy.trainer.live import Live
from litdeploy.trainer.run import Run


def refill(run: Run, live: Live) -> None:
    """Fills an empty cache as the run had filled it up to its position, batch by batch.

    In the same batches: what a teacher makes of an image may differ in its last bits between two of them.
    """
    order, draws = (torch.Generator().manual_seed(run.recipe.seed) for _ in range(2))
    passes = Epochs(
        live.passes.step, run.teacher, run.cache, live.optimiser, run.input, run.recipe, order, draws, capture=False
    )
    position = run.position
    for number, phase in enumerate(run.phases[: position.phase + 1]):
        under_way = number == position.phase
        for epoch in range(position.epoch + 1 if under_way else phase.settings.epochs):
            last = under_way and epoch == position.epoch
            passes.refill(run.data.train, phase.objective.needs_teacher, position.step if last else None)
