"""Accuracy of whatever gives logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.errors import DataError
from litdeploy.networks.batch import Batch
from litdeploy.storage.records import Accuracy


def accuracy(run: Callable[[Batch], Tensor], batches: Iterable[tuple[Batch, Tensor]]) -> Accuracy:
    """Top-1 accuracy and mean cross-entropy.

    Sums stay on the device and are read once, at the end.

    Args:
        run: what a network takes → logits (N, classes).
        batches: (what it takes, int64 labels (N)), on the device of `run`.

    Raises:
        DataError: there are no batches.
    """
    loss: Tensor | None = None
    hits: Tensor | None = None
    images = 0
    with torch.no_grad():
        for batch, labels in batches:
            logits = run(batch)
            batch_loss = F.cross_entropy(logits.float(), labels, reduction="sum").double()
            batch_hits = (logits.argmax(1) == labels).sum()
            loss = batch_loss if loss is None else loss + batch_loss
            hits = batch_hits if hits is None else hits + batch_hits
            images += len(labels)
    if loss is None or hits is None:
        raise DataError("there is nothing to evaluate on: the split is empty. Give --data a dataset with such a split.")
    return Accuracy(top1=hits.item() / images, loss=loss.item() / images, images=images)
