from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from litdeploy.batch import Batch
from litdeploy.errors import DataError, NetworkError
from litdeploy.evaluation import retrieval as module
from litdeploy.evaluation.retrieval import METRICS, Metric, embeddings, retrieval
from litdeploy.networks import new
from litdeploy.tasks import TASKS


def samples(count: int, seed: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Embeddings that tell their class with some noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.5 * torch.randn(count, 6, generator=generator), labels


def brute_force(database: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor, metric: Metric) -> tuple[float, ...]:
    """The definition, one query and one level at a time; scikit-learn ranks."""
    neighbours = NearestNeighbors(n_neighbors=len(database), algorithm="brute", metric=metric).fit(database.numpy())
    ranked = neighbours.kneighbors(queries.numpy(), return_distance=False)
    averages, nearest = [], []
    for order, label in zip(ranked, wanted.numpy(), strict=True):
        relevant = labels.numpy()[order] == label
        total = relevant.sum()
        found = [relevant[: rank + 1].sum() for rank in range(len(order))]
        precision = [count / (rank + 1) for rank, count in enumerate(found)]
        at_levels = [
            max((p for p, count in zip(precision, found, strict=True) if 10 * count >= level * total), default=0.0)
            for level in range(11)
        ]
        averages.append(float(np.mean(at_levels)) if total else 0.0)
        nearest.append(relevant[:20].mean())
    return float(np.mean(averages)), float(np.mean(nearest))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_as_by_brute_force(metric: Metric, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    database, queries = samples(131, 0), samples(23, 1)
    monkeypatch.setattr(module, "_BLOCK", block * len(database[0]))
    found = retrieval(*database, *queries, metric, top=20)
    average, nearest = brute_force(*database, *queries, metric)
    assert found.mean_average_precision == pytest.approx(average, abs=1e-6)
    assert found.top_precision == pytest.approx(nearest, abs=1e-6)
    assert 0.3 < average < 0.95
    assert (found.metric, found.queries, found.database, found.top) == (metric, 23, 131, 20)


def test_worked_by_hand() -> None:
    """Ranked: relevant, not, relevant, not. Precision 1 up to recall 0.5, then 2/3 at 0.6 … 1.0."""
    database = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    found = retrieval(database, torch.tensor([1, 0, 1, 0]), torch.zeros(1, 1), torch.tensor([1]), "l2")
    assert found.mean_average_precision == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert (found.top, found.top_precision) == (4, 0.5)


def test_a_class_that_the_database_lacks_is_never_found() -> None:
    database = torch.tensor([[0.0], [1.0]])
    found = retrieval(database, torch.tensor([0, 0]), torch.zeros(2, 1), torch.tensor([0, 5]), "l2")
    assert found.mean_average_precision == 0.5


def test_an_embedding_is_what_the_head_is_given() -> None:
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)), nn.Linear(5, 3)
    network = nn.Sequential(body, head)
    batches = [(torch.randn(4, 3, 2, 2), torch.arange(4)), (torch.randn(2, 3, 2, 2), torch.arange(2))]
    vectors, labels = embeddings(network, batches)
    network.eval()
    assert torch.equal(vectors, torch.cat([body(images) for images, _ in batches]))
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert not vectors.requires_grad


def test_texts_are_embedded() -> None:
    made = new("vdcnn9", normalise=None, classes=3, seed=0)
    head = [layer for layer in made.module.modules() if isinstance(layer, nn.Linear)][-1]
    vectors, _ = embeddings(made.module, [(made.example(3), torch.arange(3))])
    assert vectors.shape == (3, head.in_features)


def test_a_batch_of_several_tensors_is_embedded() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits: Tensor = self.head((self.words(input_ids) * attention_mask[..., None]).mean(1))
            return logits

    ids_NL = torch.ones(2, 5, dtype=torch.int64)
    batch: Batch = {"input_ids": ids_NL, "attention_mask": ids_NL}
    network = Tokens()
    vectors, _ = embeddings(network, [(batch, torch.arange(2))])
    assert torch.equal(vectors, network.words(ids_NL).mean(1))


def test_what_has_no_embedding() -> None:
    with pytest.raises(NetworkError, match="head is a linear layer"):
        embeddings(nn.Flatten(), [(torch.zeros(2, 1, 2, 2), torch.arange(2))])
    with pytest.raises(DataError, match="empty"):
        embeddings(nn.Linear(1, 1), [])


def test_an_embedder_gives_its_own_embeddings() -> None:
    batch = torch.randn(3, 1, 2, 2)
    vectors, labels = embeddings(nn.Flatten(), [(batch, torch.arange(3))], TASKS["embedding"])
    assert torch.equal(vectors, batch.flatten(1))
    assert labels.tolist() == [0, 1, 2]
