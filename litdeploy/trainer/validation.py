"""A module's score on a split of the data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from litdeploy.batch import Batch, cast, forward
from litdeploy.config.spec import NetworkSpec
from litdeploy.data import Split, normalised_batches
from litdeploy.networks.output import answer_of
from litdeploy.storage.records import Score
from litdeploy.tasks import task_of
from litdeploy.trainer.functions import Functions


def evaluate(
    module: nn.Module,
    split: Split,
    spec: NetworkSpec,
    precision: str,
    reference: nn.Module | None = None,
    functions: Functions | None = None,
    batch_size: int = 256,
) -> Score:
    """Measure a module on a split, on the module's device. Leaves it in eval mode.

    Args:
        spec: of the module.
        reference: the teacher, if the task's metric compares with it.
        functions: the user's own metric, in the place of the task's.
    """
    batches = normalised_batches(split, spec.input, batch_size)
    if functions is not None and functions.measures:
        return functions.evaluate(_answers(module, spec.task_name, precision), batches, spec)
    original = None if reference is None else _answers(reference, spec.task_name, precision)
    run = _answers(module, spec.task_name, precision)
    score: Score = task_of(spec).evaluate(run, batches, spec.input, original)
    return score


def _answers(module: nn.Module, task: str, precision: str) -> Callable[[Batch], Batch]:
    module.eval()
    device = next(module.parameters()).device

    @torch.no_grad()
    def run(batch: Batch) -> Batch:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return cast(answer_of(forward(module, batch), task), torch.float32)

    return run
