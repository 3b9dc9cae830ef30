"""Does an artefact compute what the network computes? Run both and compare; the task says how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from litdeploy.batch import Batch, device_of, in_parts, joined, picked, size_of
from litdeploy.config.spec import NetworkSpec
from litdeploy.config.target import Tolerance
from litdeploy.runtime import Runner
from litdeploy.storage.records import Parity, same_class
from litdeploy.tasks import task_of
from litdeploy.tasks.task import without_labels

# Calls for each batch size. Small batches compute what large ones do with other kernels: a few samples show it, and 64
# calls of one sample are minutes for a deep network on a busy processor.
_MOST_CALLS = 16


def compare_runners(
    reference: Runner,
    candidate: Runner,
    inputs: Batch,
    batch_sizes: Sequence[int],
    tolerance: Tolerance,
    spec: NetworkSpec,
    labels_N: Tensor | None = None,
) -> Parity:
    """Run both on the same samples, in calls of each batch size, and compare.

    Args:
        reference, candidate: open, on one device.
        inputs: what the network takes, on that device; at least one sample. Repeated if a batch takes more.
        batch_sizes: each sees as many whole batches as the samples fill, at least one and at most sixteen.
        spec: of the network.
        labels_N: of the samples, int64; None or −1, or a task whose metric compares with no labels: none is measured.
    """
    task = task_of(spec)
    # The share of equal classes is judged over all batch sizes together: calls of one sample see few samples.
    each_size = tolerance.model_copy(update={"top1": 0.0})
    batches = []
    for size in batch_sizes:
        calls = min(max(1, size_of(inputs) // size), _MOST_CALLS)
        rows = torch.arange(calls * size, device=device_of(inputs)) % size_of(inputs)
        parts = [picked(inputs, some) for some in torch.split(rows, size)]
        expected, found = (joined([runner.run(part) for part in parts]) for runner in (reference, candidate))
        batches.append(task.compare(expected, found, size, each_size, spec.input))
    top1 = same_class(batches)
    parity = Parity(
        reference=reference.name,
        candidate=candidate.name,
        tolerance=tolerance,
        batches=tuple(batches),
        within=all(batch.within for batch in batches) and (top1 is None or top1 >= tolerance.top1),
    )
    if labels_N is None or task.needs_teacher(not without_labels(labels_N)):
        return parity
    size = max(batch_sizes)
    labeled = list(zip(in_parts(inputs, size), torch.split(labels_N, size), strict=True))
    before, after = (task.evaluate(runner.run, labeled, spec.input) for runner in (reference, candidate))
    return parity.with_labels(task.compare_scores(before, after, tolerance))
