"""A feature cache that was lost with its process, made again: the passes once more, with the teacher alone."""

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
    # What the teachers before this one gave is not kept any more; their passes drew from the generators.
    taught_since = max(
        (
            number
            for number, phase in enumerate(run.phases[: position.phase + 1])
            if phase.transition is not None and phase.transition.new_teacher
        ),
        default=0,
    )
    for number, phase in enumerate(run.phases[: position.phase + 1]):
        under_way = number == position.phase
        for epoch in range(position.epoch + 1 if under_way else phase.settings.epochs):
            last = under_way and epoch == position.epoch
            taught = phase.objective.needs_teacher and number >= taught_since
            passes.refill(run.data.train, taught, position.step if last else None)
