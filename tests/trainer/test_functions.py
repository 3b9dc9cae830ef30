"""The user's own loss and metric: trained and measured by them, and tried before anything is written."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import litdeploy
from litdeploy.config.spec import TensorInput
from litdeploy.errors import BundleError, SettingsError
from litdeploy.networks import load
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Measures
from litdeploy.trainer.functions import name_of, own_functions

N = 40
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
TARGETS = X.sum(1, keepdim=True) / 3


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.body = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(self.stem(x)))
        return result


class Seen:
    """Counts the batches that a function is given."""

    batches = 0


def to_target(student: Tensor, teacher: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, targets = batch
    assert (x.shape[1], targets.dtype, teacher.requires_grad) == (6, torch.float32, False)
    Seen.batches += 1
    return F.mse_loss(student, teacher) + F.mse_loss(student[:, :1], targets)


def closeness(output: Tensor, batch: tuple[Tensor, Tensor]) -> float:
    return -F.l1_loss(output[:, :1], batch[1]).item()


def compressed(out: Path, **given: Any) -> Bundle:
    torch.manual_seed(0)
    settings = {"student_blocks": {"body": 1}, "epochs": 2, "device": "cpu", "precision": "fp32", "batch_size": 8}
    return litdeploy.compress(Regression(), out=out, progress=False, **{**settings, **given})


def test_a_student_is_trained_and_measured_by_the_users_functions(tmp_path: Path) -> None:
    Seen.batches = 0
    bundle = compressed(tmp_path / "b", data=(X, TARGETS), loss=to_target, metric=closeness)
    manifest = bundle.read_complete()
    assert Seen.batches > 4
    assert manifest.functions == {"loss": f"{__name__}.to_target", "metric": f"{__name__}.closeness"}
    for role in ("teacher", "student"):
        score = manifest.metrics[role]["test"]
        assert isinstance(score, Measures)
        assert list(score.values) == ["closeness"]
        assert score.images == manifest.data.images["test"]
    student = load(bundle.student_path, network=Regression).module
    assert manifest.metrics["student"]["test"].values["closeness"] < 0  # type: ignore[union-attr]
    assert student(X).shape == (N, 2)
    with pytest.raises(BundleError, match=r"functions\.metric"):
        compressed(tmp_path / "b", data=(X, TARGETS), loss=to_target, metric=lambda *_: 1.0, resume=True)


def test_a_loss_and_a_metric_take_the_batches_of_a_loader(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(X, TARGETS), 8)
    best = functools.partial(closeness)
    manifest = compressed(
        tmp_path, data=loader, val_data=loader, loss=to_target, metric=best, method="kd"
    ).read_complete()
    assert manifest.functions["metric"] == f"{__name__}.closeness"


def test_named_data_give_inputs_and_labels(teacher_path: Path, tmp_path: Path) -> None:
    seen = set()

    def loss(student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
        seen.add((batch[0].dim(), batch[1].dtype))
        return F.mse_loss(student, teacher)

    given: dict[str, Any] = {"student_depth": 8, "epochs": 1, "device": "cpu", "progress": False}
    litdeploy.compress(teacher_path, data="digits", out=tmp_path / "b", loss=loss, **given)
    assert seen == {(4, torch.int64)}


def scalar(*_: Any) -> Tensor:
    return torch.zeros((), requires_grad=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": lambda s, t, b: (s - t).square()}, r"loss=.*returned a tensor of shape \(2, 2\)"),
        ({"loss": lambda s, t, b: 3.0}, "returned a float"),
        ({"loss": lambda s, t, b: (s.detach() - t).mean()}, "without a gradient"),
        ({"loss": scalar}, "without a gradient"),
        ({"loss": lambda s, t, b: s.mean() / 0}, "returned (inf|-inf|nan)"),
        ({"loss": lambda s, t: s.mean()}, "raised TypeError on the first batch"),
        ({"loss": 3}, "loss: is a int"),
        ({"metric": lambda o, b: o}, r"metric=.*returned a tensor of shape"),
        ({"metric": lambda o, b: None}, "returned a NoneType"),
        ({"metric": lambda o, b: float("nan")}, "returned nan"),
        ({"metric": lambda o, b: b["x"]}, "raised TypeError"),
    ],
)
def test_what_is_no_loss_or_metric_is_refused(given: dict[str, Any], message: str) -> None:
    teacher = load(Regression(), input=TensorInput.of((6,), "x"))
    with pytest.raises(SettingsError, match=message):
        own_functions(given.get("loss"), given.get("metric"), teacher, None)
    assert not any(parameter.grad is not None for parameter in teacher.module.parameters())


def test_a_method_without_a_teacher_has_no_use_for_a_loss(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--method scratch"):
        compressed(tmp_path / "b", data=(X, TARGETS[:, 0].long()), loss=scalar_of, method="scratch")
    assert not (tmp_path / "b").exists()


def scalar_of(student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
    return student.mean()


def test_names_of_functions() -> None:
    assert name_of(functools.partial(functools.partial(scalar_of, 1))) == f"{__name__}.scalar_of"
    assert name_of(Seen()) == f"{__name__}.Seen"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": "digits", "loss": scalar_of}, "'loss' is a function, which settings cannot hold"),
        ({"data": "digits", "main": {"epochs": X}}, r"'main\.epochs' is a Tensor"),
        ({"data": (X, TARGETS)}, "data: is a tuple. Give the name of a dataset"),
    ],
)
def test_verbs_of_named_data_say_what_they_do_not_take(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        litdeploy.train("resnet8", out=tmp_path / "t.safetensors", progress=False, **given)
