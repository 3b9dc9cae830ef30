from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from litdeploy.config.recipe import Recipe
from litdeploy.errors import SettingsError
from litdeploy.evaluation import evaluate_retrieval
from litdeploy.files import sha256_of
from litdeploy.networks import load
from litdeploy.networks.width import Match
from litdeploy.trainer import compress
from litdeploy.trainer.methods import Start
from litdeploy.trainer.methods.indistill import growing, indistill
from litdeploy.trainer.objectives import Outputs
from litdeploy.trainer.objectives.indistill import ProbabilisticTransfer
from tests.trainer.test_compress import QUICK

KEPT = torch.tensor([0, 3, 4])
MATCHES = (Match("one", "layer1", 1, KEPT), Match("two", "layer2", 1, None), Match("three", "layer3", 2, KEPT))
RECIPE = Recipe.model_validate({"method": "indistill", "main": {"epochs": 70, "learning_rate": 0.1}})


def published(teacher: Tensor, student: Tensor) -> float:
    """PKT with both kernels, number by number."""

    def kernels(x: list[list[float]]) -> list[list[list[float]]]:
        def dot(a: list[float], b: list[float]) -> float:
            return sum(p * q for p, q in zip(a, b, strict=True))

        cosine = [[(dot(a, b) / ((dot(a, a) ** 0.5) * (dot(b, b) ** 0.5)) + 1) / 2 for b in x] for a in x]
        near = [[1 / (1 + sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5) for b in x] for a in x]
        return [[[value / sum(row) for value in row] for row in kernel] for kernel in (cosine, near)]

    total = 0.0
    for t, s in zip(kernels(teacher.tolist()), kernels(student.tolist()), strict=True):
        pairs = [(a, b) for row_t, row_s in zip(t, s, strict=True) for a, b in zip(row_t, row_s, strict=True)]
        logs = torch.tensor(pairs, dtype=torch.float64).log().tolist()
        total += sum((a - b) * (la - lb) for (a, b), (la, lb) in zip(pairs, logs, strict=True)) / len(pairs)
    return total


@pytest.mark.parametrize("label_weight", [0.0, 2.0])
def test_pkt_is_its_formula(label_weight: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 3, 2, 2, requires_grad=True), torch.randn(6, 5, 2, 2)
    logits, labels = torch.randn(6, 4), torch.arange(6) % 4
    outputs = Outputs(logits, labels, chain={"layer3": (student, teacher)})
    found = ProbabilisticTransfer("layer3", 10.0, label_weight).losses(outputs)
    expected = published(teacher.mean((2, 3)), student.detach().mean((2, 3)))
    # The formula keeps its roots off zero by 1e-6, of which the diagonal of the L2 kernel takes 1e-3.
    assert found["pkt"].item() == pytest.approx(expected, rel=2e-3)
    to_labels = -logits.log_softmax(1)[range(6), labels].mean()
    torch.testing.assert_close(found["loss"], 10 * found["pkt"] + label_weight * to_labels)
    assert ("labels" in found) == bool(label_weight)
    found["loss"].backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_pkt_of_embeddings_that_are_alike_or_opposite_is_finite() -> None:
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    outputs = Outputs(torch.empty(0), torch.zeros(3), chain={"a": (student, torch.zeros(3, 4))})
    found = ProbabilisticTransfer("a", 1.0, 0.0).losses(outputs)
    found["loss"].backward()
    assert found["loss"].isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_layer_is_drawn_to_the_kept_channels() -> None:
    first, second, third, last = indistill(RECIPE, Start(("one", "two", "three"), MATCHES))
    assert [phase.name for phase in (first, second, third, last)] == ["one", "two", "three", "kd"]
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    found = first.objective.losses(Outputs(torch.empty(0), torch.empty(0), chain={"one": (student, teacher)}))["loss"]
    pairs = [(student[:, ours], teacher[:, theirs]) for ours, theirs in enumerate((0, 3, 4))]
    expected = sum(((a - b) ** 2).sum() for a, b in pairs) / student.numel()
    torch.testing.assert_close(found, expected)
    student, teacher = torch.randn(2, 7, 3), torch.randn(2, 7, 5)
    found = third.objective.losses(Outputs(torch.empty(0), torch.empty(0), chain={"three": (student, teacher)}))["loss"]
    torch.testing.assert_close(found, (student - teacher[..., KEPT]).square().mean())


def test_the_curriculum_has_the_published_epochs() -> None:
    phases = indistill(RECIPE.with_epochs(70), Start(("one", "two", "three"), MATCHES))
    assert [phase.settings.epochs for phase in phases] == [3, 4, 5, 58]
    for epochs in range(4, 60):
        for layers in (1, 3, 4):
            shared = growing(epochs, layers)
            assert sum(shared) == epochs
            assert shared == sorted(shared)
            assert shared[0] >= 1


def test_too_few_epochs_are_refused() -> None:
    with pytest.raises(SettingsError, match="--epochs 4 or more"):
        indistill(RECIPE.with_epochs(3), Start(("one", "two", "three"), MATCHES))


@pytest.mark.parametrize("then", ["kd", "pkt"])
def test_on_digits(teacher_path: Path, tmp_path: Path, then: str) -> None:
    before = sha256_of(teacher_path)
    quick = {**QUICK, "student_depth": None, "epochs": 4, "method": "indistill"}
    settings = {"student": "resnet8,width=2", "then": then}
    bundle = compress(teacher_path, out=tmp_path / "deploy", indistill=settings, **quick)
    manifest = bundle.read_complete()
    rows = [json.loads(line) for line in bundle.metrics_path.read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["layer1", "layer2", "layer3", then]
    student = load(bundle.student_path)
    assert student.spec == manifest.student
    assert (student.spec.arguments["width"], student.spec.classes) == (2, tuple("0123456789"))
    assert student.spec.input == load(teacher_path).spec.input
    assert sha256_of(teacher_path) == before
    cosine, l2 = evaluate_retrieval(bundle.path)
    assert (cosine.metric, l2.metric) == ("cosine", "l2")
    assert (cosine.queries, cosine.database) == (manifest.data.images["test"], manifest.data.images["train"])
    assert 0.1 < cosine.mean_average_precision < 1
