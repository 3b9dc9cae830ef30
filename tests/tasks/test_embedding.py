from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from litdeploy.config.spec import TokenInput
from litdeploy.config.target import Target, Tolerance
from litdeploy.errors import DataError, RunnerError
from litdeploy.storage.records import Measures
from litdeploy.tasks import TASKS
from litdeploy.tasks.embedding import neighbor_overlap, pair_correlation

SPEC = TokenInput(length=4, vocabulary=9)
EMBEDDING = TASKS["embedding"]
NO_LABELS = torch.full((2,), -1)
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_one_minus_the_cosine_whatever_the_lengths() -> None:
    student, teacher = drawn(2, 5).requires_grad_(), drawn(2, 5, seed=1)
    found = EMBEDDING.loss(student, 3 * teacher, NO_LABELS, 0.0, 4.0)
    own, other = (each / each.norm(dim=1, keepdim=True) for each in (student.detach(), teacher))
    assert found.item() == pytest.approx((1 - (own * other).sum(1)).mean().item(), abs=1e-6)
    found.backward()
    assert student.grad is not None
    assert EMBEDDING.loss(teacher, teacher, NO_LABELS, 0.0, 4.0).item() == pytest.approx(0, abs=1e-6)


def test_a_sequence_is_averaged_over_the_tokens_that_count() -> None:
    student, teacher = drawn(2, 4, 5), drawn(2, 4, 5, seed=1)
    inputs = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": MASK}
    pooled = [torch.stack([each[0, :2].mean(0), each[1].mean(0)]) for each in (student, teacher)]
    expected = (1 - F.cosine_similarity(*pooled)).mean()
    torch.testing.assert_close(EMBEDDING.loss(student, teacher, NO_LABELS, 0.0, 1.0, inputs), expected)
    torch.testing.assert_close(EMBEDDING.vectors(student, None), student.mean(1))


def _nearest(vectors: Tensor, count: int) -> list[set[int]]:
    unit = F.normalize(vectors, dim=1)
    near = unit @ unit.T
    return [
        set(sorted((j for j in range(len(near)) if j != i), key=lambda j: -float(near[i, j]))[:count])
        for i in range(len(near))
    ]


def test_neighbors_are_as_sorted_one_by_one() -> None:
    expected, found = drawn(600, 6), drawn(600, 6) + 0.3 * drawn(600, 6, seed=1)
    lists = zip(_nearest(expected, 10), _nearest(found, 10), strict=True)
    shared = [len(one & other) / 10 for one, other in lists]
    assert neighbor_overlap(expected, found) == pytest.approx(sum(shared) / 600)
    assert neighbor_overlap(expected, 2 * expected) == 1


def test_the_correlation_of_pairs_is_scipys() -> None:
    expected, found = drawn(40, 6), drawn(40, 6) + drawn(40, 6, seed=1)
    found[1] = found[0]  # equal similarities share a rank
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(40, (500,), generator=generator)
    second = (first + torch.randint(1, 40, (500,), generator=generator)) % 40
    sides = [F.cosine_similarity(each[first].double(), each[second].double()) for each in (expected, found)]
    assert pair_correlation(expected, found, 500) == pytest.approx(spearmanr(*sides).statistic, abs=1e-9)
    assert (first != second).all()


def test_a_student_is_measured_against_its_teacher() -> None:
    expected, found = drawn(30, 6), drawn(30, 6) + 0.2 * drawn(30, 6, seed=1)
    answers = {"teacher": iter(expected.split(8)), "student": iter(found.split(8))}
    batches = [(each, torch.full((len(each),), -1)) for each in torch.zeros(30, 1).split(8)]
    score = EMBEDDING.evaluate(lambda _: next(answers["student"]), batches, SPEC, lambda _: next(answers["teacher"]))
    assert score.images == 30
    assert score.values["cosine"] == pytest.approx(F.cosine_similarity(expected, found).mean().item(), abs=1e-6)
    assert score.values["neighbors"] == neighbor_overlap(expected, found)
    assert score.values["spearman"] == pair_correlation(expected, found)


def test_what_cannot_be_measured_is_refused() -> None:
    batches = [(torch.zeros(2, 1), NO_LABELS)]
    with pytest.raises(DataError, match=r"no teacher is given\. Name it: --teacher FILE"):
        EMBEDDING.evaluate(lambda _: drawn(2, 3), batches, SPEC)
    with pytest.raises(DataError, match="the split is empty"):
        EMBEDDING.evaluate(lambda _: drawn(2, 3), [], SPEC, lambda _: drawn(2, 3))
    with pytest.raises(RunnerError, match=r"outputs of \(2, 3\) cannot be compared with outputs of \(2, 4\)"):
        EMBEDDING.evaluate(lambda _: drawn(2, 3), batches, SPEC, lambda _: drawn(2, 4))


def test_a_network_that_fails_has_the_worst_cosine() -> None:
    batches = [(torch.zeros(2, 1), NO_LABELS)]
    score = EMBEDDING.evaluate(lambda _: drawn(2, 3) * math.nan, batches, SPEC, lambda _: drawn(2, 3))
    assert score.values == {"cosine": -1}
    assert EMBEDDING.key(score) == -1


@pytest.mark.parametrize(("far", "within"), [(0.0, True), (1e-5, True), (0.1, False)])
def test_a_file_is_near_by_value_and_by_direction(far: float, within: bool) -> None:
    expected, noise = drawn(8, 16), drawn(8, 16, seed=1)
    found = EMBEDDING.compare(expected, expected + far * noise, 8, Target().tolerance.fp32, SPEC)
    assert found.within is within
    cosine = F.cosine_similarity(expected.double(), (expected + far * noise).double())
    assert found.cosines == pytest.approx((cosine.min().item(), cosine.mean().item()))
    assert found.alike().startswith("cosine at least ")
    broken = EMBEDDING.compare(expected, expected * math.nan, 8, Tolerance(), SPEC)
    assert (broken.max_absolute, broken.cosines, broken.within) == (None, None, False)


def test_a_report_has_the_measures_of_the_student_alone() -> None:
    values = {"cosine": 0.91342, "neighbors": 0.4931, "spearman": 0.908}
    student = {"test": Measures(task="embedding", values=values, images=50)}
    assert EMBEDDING.headline({}, student) == (
        "Mean cosine to the teacher",
        "0.9134",
        "Overlap of the 10 nearest neighbors: 0.493; Rank correlation of pair similarities: 0.9080; test",
    )
    assert EMBEDDING.verdict({}, student) == (
        "; mean cosine to the teacher: 0.9134 (test split; not compared with labels)"
    )
    assert [(row.label, row.teacher, row.student, row.change) for row in EMBEDDING.rows({}, student)][:1] == [
        ("Mean cosine to the teacher, test", "–", "0.9134", "–")
    ]
    assert EMBEDDING.points(student["test"], student["test"]) is None
