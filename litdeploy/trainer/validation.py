"""A module's score on a split of the data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, forward
from litdeploy.config.spec import AnyInput
from litdeploy.data import Split, normalised_batches
from litdeploy.networks.network import logits_of
from litdeploy.storage.records import Score
from litdeploy.tasks import task_of


def evaluate(
    module: nn.Module,
    split: Split,
    spec: AnyInput,
    precision: str,
    reference: nn.Module | None = None,
    batch_size: int = 256,
) -> Score:
    """Measure a module on a split, on the module's device. Leaves it in eval mode.

    Args:
        reference: the teacher, if the task's metric compares with it.
    """
    batches = normalised_batches(split, spec, batch_size)
    original = None if reference is None else _answers(reference, precision)
    score: Score = task_of(spec).evaluate(_answers(module, precision), batches, spec, original)
    return score


def _answers(module: nn.Module, precision: str) -> Callable[[Batch], Tensor]:
    module.eval()
    device = next(module.parameters()).device

    @torch.no_grad()
    def run(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return logits_of(forward(module, batch)).float()

    return run
