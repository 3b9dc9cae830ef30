"""Retrieval: how well a network's embeddings find images of the same class, by mean average precision.

Shape suffixes: N images of a batch, M images of the database, Q queries of a block, E numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, forward, size_of
from litdeploy.errors import DataError, NetworkError
from litdeploy.networks import answer_of
from litdeploy.storage.records import Record
from litdeploy.tasks import Task

Metric = Literal["cosine", "l2"]
METRICS: tuple[Metric, ...] = ("cosine", "l2")

# Similarities sorted at a time: 32 MB, and five times that during the sort.
_BLOCK = 2**23
_LEVELS = 10


class Retrieval(Record):
    """How well queries retrieve images of their class from a database.

    Attributes:
        metric: that ranks the database, nearest first: `cosine` similarity or `l2` distance.
        mean_average_precision: mean over the queries of the 11-point interpolated average precision, 0–1.
        top_precision: mean share of the query's class among the nearest `top`, 0–1.
        queries, database: numbers of images.
    """

    metric: Metric
    mean_average_precision: float
    top_precision: float
    top: int
    queries: int
    database: int


def embeddings(
    module: nn.Module, batches: Iterable[tuple[Batch, Tensor]], task: Task[Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings of an embedder, or of a classifier: the input of the linear layer that runs last.

    Args:
        module: put in eval mode.
        batches: (inputs, int64 labels (N)), on the module's device.
        task: of the module; None: classification.

    Returns:
        (images, E), float32, and the labels, on that device.

    Raises:
        NetworkError: no linear layer runs, or its input is not one vector per image.
        DataError: there are no batches.
    """
    found: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad(), embedder(module) as embed:
        for batch, labels_N in batches:
            own_NE = None
            if task is not None and task.embeds:
                own_NE = task.vectors(answer_of(forward(module, batch), task.name), batch)
            found.append((embed(batch)[0] if own_NE is None else own_NE.float(), labels_N))
    if not found:
        raise DataError("there is nothing to embed: the split is empty. Give --data a dataset with this split.")
    vectors, labels = zip(*found, strict=True)
    return torch.cat(vectors), torch.cat(labels)


@contextmanager
def embedder(module: nn.Module) -> Iterator[Callable[[Batch], tuple[Tensor, Tensor]]]:
    """Turn a classifier into a function that returns its embeddings with its logits.

    Args:
        module: put in eval mode.

    Yields:
        Inputs → (embeddings (N, E), logits (N, classes)), float32. It raises a NetworkError if no linear layer runs, or
        the last one's input is not one vector per image.
    """
    given: list[Tensor] = []

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        given[:] = args[:1]

    def embed(batch: Batch) -> tuple[Tensor, Tensor]:
        given.clear()
        logits = answer_of(forward(module, batch), "classification")
        assert isinstance(logits, Tensor)
        if not given or given[0].shape[:-1] != (size_of(batch),):
            raise NetworkError("embeddings need a network whose head is a linear layer on one vector per sample.")
        return given[0].float(), logits.float()

    module.eval()
    handles = [layer.register_forward_pre_hook(hook) for layer in module.modules() if isinstance(layer, nn.Linear)]
    try:
        yield embed
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def retrieval(
    database_ME: Tensor, labels_M: Tensor, queries_E: Tensor, query_labels: Tensor, metric: Metric, top: int = 100
) -> Retrieval:
    """Rank the database for each query; images of the query's class are relevant.

    Precision at a level of recall r is the highest at any recall of r or more (Manning et al., "Introduction to
    Information Retrieval", section 8.4), at r = 0, 0.1, …, 1. A query whose class the database lacks counts as 0.
    Equally near images rank in the database's order. Computed in blocks of queries, on the tensors' device.

    Args:
        database_ME, queries_E: embeddings, one a row.
        labels_M, query_labels: int64, one a row.
        top: number of nearest images for `top_precision`; all if there are fewer.
    """
    top = min(top, len(database_ME))
    totals = torch.zeros(2, dtype=torch.float64, device=database_ME.device)
    block = max(1, _BLOCK // len(database_ME))
    for queries_QE, labels_Q in zip(torch.split(queries_E, block), torch.split(query_labels, block), strict=True):
        order_QM = _distances(queries_QE, database_ME, metric).argsort(dim=1, stable=True)
        relevant_QM = labels_M[order_QM] == labels_Q[:, None]
        average_Q = _average_precision(relevant_QM)
        totals += torch.stack([average_Q.double().sum(), relevant_QM[:, :top].double().mean(1).sum()])
    average, nearest = (totals / len(queries_E)).tolist()
    return Retrieval(
        metric=metric,
        mean_average_precision=average,
        top_precision=nearest,
        top=top,
        queries=len(queries_E),
        database=len(database_ME),
    )


def _distances(queries_QE: Tensor, database_ME: Tensor, metric: Metric) -> Tensor:
    """(Q, M), float32: smaller is nearer."""
    if metric == "l2":
        return torch.cdist(queries_QE, database_ME)
    unit = nn.functional.normalize
    return -unit(queries_QE) @ unit(database_ME).T


def _average_precision(relevant_QM: Tensor) -> Tensor:
    """11-point interpolated average precision of each query (Q); `relevant_QM` is in ranked order."""
    found_QM = relevant_QM.cumsum(1)
    ranks_M = torch.arange(1, relevant_QM.shape[1] + 1, device=relevant_QM.device)
    # The highest from this rank on: recall never decreases with rank.
    best_QM = (found_QM / ranks_M).flip(1).cummax(1).values.flip(1)
    in_all_Q = found_QM[:, -1:]
    # The first rank that reaches each level, in integers: i/10 has no exact float.
    levels = torch.arange(_LEVELS + 1, device=relevant_QM.device)
    needed_QL = (in_all_Q * levels + _LEVELS - 1) // _LEVELS
    first_QL = torch.searchsorted(found_QM, needed_QL).clamp(max=len(ranks_M) - 1)
    return torch.where(in_all_Q[:, 0] > 0, best_QM.gather(1, first_QL).mean(1), 0.0)
