from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litdeploy.batch import Batch
from litdeploy.config.spec import TokenInput
from litdeploy.config.target import Tolerance
from litdeploy.errors import DataError
from litdeploy.storage.records import Measures
from litdeploy.tasks import TASKS, tokens

SPEC = TokenInput(length=6, vocabulary=7)
TOKENS = TASKS["tokens"]
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
IDS = torch.tensor([[1, 2, 3, 0, 0, 0], [6, 5, 4, 3, 2, 1]])
INPUTS: Batch = {"input_ids": IDS, "attention_mask": MASK}
NO_LABELS = torch.full((2,), -1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = drawn(2, 6, 7), drawn(2, 6, 7, seed=1)


def _plain_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """τ² · KL of each token that counts, one by one."""
    each = []
    for n in range(2):
        for place in range(6):
            if MASK[n, place]:
                p, q = (F.softmax(side[n, place] / temperature, dim=0) for side in (teacher, student))
                each.append(temperature**2 * (p * (p.log() - q.log())).sum())
    return torch.stack(each).mean()


@pytest.mark.parametrize("at_once", [2**24, 14, 1])
def test_the_loss_and_its_gradient_are_as_written_out(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(tokens, "_AT_ONCE", at_once)
    one, other = (STUDENT.clone().requires_grad_() for _ in range(2))
    found, expected = TOKENS.loss(one, TEACHER, NO_LABELS, 0.0, 3.0, INPUTS), _plain_loss(other, TEACHER, 3.0)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(one.grad, other.grad)
    assert not one.grad[0, 3:].any()  # padding


def test_labels_of_tokens_weigh_in() -> None:
    labels = torch.tensor([[-100, 2, 3, -1, -1, -1], [6, 5, 4, 3, 2, 1]])
    hard = torch.stack(
        [-F.log_softmax(STUDENT[n, p], 0)[labels[n, p]] for n in range(2) for p in range(6) if labels[n, p] >= 0]
    ).mean()
    soft = TOKENS.loss(STUDENT, TEACHER, NO_LABELS, 0.0, 2.0, INPUTS)
    found = TOKENS.loss(STUDENT, TEACHER, labels, 0.25, 2.0, INPUTS)
    torch.testing.assert_close(found, 0.25 * hard + 0.75 * soft)
    with pytest.raises(
        DataError, match=r"a label for each token is needed, \(2, 6\), and the labels have the shape \(2,\)"
    ):
        TOKENS.loss(STUDENT, TEACHER, torch.zeros(2, dtype=torch.int64), 0.25, 2.0, INPUTS)


@pytest.mark.parametrize("at_once", [2**24, 14])
def test_without_labels_classes_are_compared_token_by_token(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(tokens, "_AT_ONCE", at_once)
    score = TOKENS.evaluate(lambda _: STUDENT, [(INPUTS, NO_LABELS)], SPEC, lambda _: TEACHER)
    there = MASK.bool()
    same = (STUDENT.argmax(-1) == TEACHER.argmax(-1))[there].double().mean().item()
    assert score.values["agreement"] == pytest.approx(same)
    assert score.values["divergence"] == pytest.approx(_plain_loss(STUDENT, TEACHER, 1.0).item(), rel=1e-5)
    assert score.images == 2


class _Causal:
    """Logits that depend on the ids so far; of the last alone if not `causal`."""

    def __init__(self, causal: bool) -> None:
        self.table, self.causal = drawn(7, 7), causal

    def __call__(self, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        made = self.table[batch["input_ids"]].cumsum(1)
        return made if self.causal else made.flip(1).cumsum(1)


def test_the_perplexity_of_a_causal_language_model_is_of_the_next_token() -> None:
    student, teacher = _Causal(True), _Causal(True)
    teacher.table = drawn(7, 7, seed=3)
    score = TOKENS.evaluate(student, [(INPUTS, NO_LABELS)], SPEC, teacher)
    for name, network in (("perplexity", student), ("teacher_perplexity", teacher)):
        logs = F.log_softmax(network(INPUTS), dim=-1)
        surprise = [-logs[n, p, IDS[n, p + 1]].item() for n, last in ((0, 2), (1, 5)) for p in range(last)]
        assert score.values[name] == pytest.approx(math.exp(sum(surprise) / len(surprise)), rel=1e-5)


def test_other_networks_have_no_perplexity() -> None:
    for network, spec in ((_Causal(False), SPEC), (_Causal(True), TokenInput(length=6, vocabulary=8))):
        score = TOKENS.evaluate(network, [(INPUTS, NO_LABELS)], spec, network)
        assert list(score.values) == ["agreement", "divergence"]
        assert score.values["agreement"] == 1


def test_labels_of_tokens_are_the_accuracy() -> None:
    labels = torch.tensor([[-100, 2, 3, -100, -100, -100], [6, 5, 4, 3, 2, 1]])
    score = TOKENS.evaluate(lambda _: STUDENT, [(INPUTS, labels)], SPEC)
    right = (STUDENT.argmax(-1) == labels)[labels >= 0].double().mean().item()
    assert score.values == {"accuracy": pytest.approx(right)}
    assert TOKENS.verdict({}, {"test": score}).endswith("% (test split)")


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DataError, match="no teacher is given"):
        TOKENS.evaluate(lambda _: STUDENT, [(INPUTS, NO_LABELS)], SPEC)
    with pytest.raises(DataError, match="the split is empty"):
        TOKENS.evaluate(lambda _: STUDENT, [], SPEC)


@pytest.mark.parametrize("at_once", [2**24, 7])
def test_a_file_is_near_by_value_and_by_class(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(tokens, "_AT_ONCE", at_once)
    limit = Tolerance(atol=0.5, rtol=0, top1=0.9)
    changed = STUDENT.clone()
    changed[0, 0] += 0.25
    found = TOKENS.compare(STUDENT, changed, 2, limit, SPEC)
    assert (found.max_absolute, found.top1, found.within) == (pytest.approx(0.25), 1, True)
    assert found.max_relative == pytest.approx(0.25 / STUDENT.abs().max().item())
    other = STUDENT.flip(0)
    far = TOKENS.compare(STUDENT, other, 2, Tolerance(atol=100), SPEC)
    same = (STUDENT.argmax(-1) == other.argmax(-1)).double().mean().item()
    assert (far.top1, far.within) == (pytest.approx(same), False)
    broken = TOKENS.compare(STUDENT, STUDENT * math.nan, 2, Tolerance(atol=100, top1=0), SPEC)
    assert (broken.max_absolute, broken.within) == (None, False)


def test_a_report_names_what_was_measured() -> None:
    values = {"agreement": 0.9817, "divergence": 0.0421, "perplexity": 31.256, "teacher_perplexity": 28.1}
    student = {"test": Measures(task="tokens", values=values, images=50)}
    assert TOKENS.figure(student["test"]) == "98.17 %"
    assert TOKENS.verdict({}, student) == (
        "; same class as the teacher, of all tokens: 98.17 % (test split; not compared with labels)"
    )
    assert [(row.label, row.student) for row in TOKENS.rows({}, student)][2:] == [
        ("Perplexity, test", "31.26"),
        ("Perplexity of the teacher, test", "28.10"),
    ]
    assert TOKENS.key(student["test"]) == 0.9817
