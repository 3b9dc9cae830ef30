"""Which student is delivered, and what the user is warned of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

import litdeploy
from litdeploy.config.recipe import DataSettings, Phase, Recipe
from litdeploy.config.spec import InputSpec
from litdeploy.data import Data, open_data, prepared
from litdeploy.errors import InterruptedRun
from litdeploy.networks import Network
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import read_checkpoint
from litdeploy.storage.records import Accuracy
from litdeploy.tasks import TASKS
from litdeploy.trainer import Progress, compress
from litdeploy.trainer.methods import TrainingPhase
from litdeploy.trainer.methods.slimming import Removal
from litdeploy.trainer.objectives import CrossEntropy
from litdeploy.trainer.resume import Position
from litdeploy.trainer.selection import Selection
from litdeploy.trainer.trainer import Trainer

SPOILING: dict[str, Any] = {
    "data": "digits",
    "student_blocks": {"2": 3},
    "device": "cpu",
    "precision": "fp32",
    "method": "kd",
    "optimiser": "adamw",
    "main": {"epochs": 2, "learning_rate": 0.3},
    "finetune": {"epochs": 0},
    "weight_decay": 0.0,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * F.relu(self.linear(x))


def own_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.Sequential(*(Block() for _ in range(4))), nn.Linear(32, 10)
    )


@pytest.fixture(scope="module")
def teacher() -> Network:
    """A network that has learned digits, and that can do without a block."""
    module = own_network()
    network = litdeploy.load(module, input_shape=(1, 8, 8), normalise="half")
    split = open_data(DataSettings(source="digits"), torch.device("cpu"), 0).train
    (picked,) = split.pick([torch.arange(len(split))])
    assert isinstance(network.spec.input, InputSpec)
    images, labels = prepared(picked.images(), network.spec.input), picked.labels_N
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(module(images), labels).backward()
        optimizer.step()
    return network


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def rows(bundle: Bundle) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bundle.metrics_path.read_text().splitlines()]


def test_a_run_that_spoils_its_student_delivers_the_cut(teacher: Network, tmp_path: Path) -> None:
    told = Notes()
    manifest = compress(teacher, out=tmp_path / "best", progress=told, **SPOILING).read_complete()
    cut = manifest.metrics["cut"]["validation"]
    assert manifest.metrics["student"]["validation"] == cut
    assert manifest.run.delivered == 0
    weights = read_checkpoint(Bundle(tmp_path / "best").student_path).weights
    kept = {name: value for name, value in teacher.module.state_dict().items() if name.startswith("2.0")}
    assert all(torch.equal(weights[name], value) for name, value in kept.items())
    (warning,) = manifest.warnings
    assert warning.startswith("no epoch made the student better than the cut alone")
    assert "--learning-rate 0.1)" in warning
    assert f"the cut alone: {cut.summary()} on validation" in told.notes
    assert f"warning: {warning}" in told.notes


def test_the_last_is_kept_if_the_recipe_says_so(teacher: Network, tmp_path: Path) -> None:
    bundle = compress(teacher, out=tmp_path / "last", keep="last", **SPOILING)
    manifest = bundle.read_complete()
    assert manifest.run.delivered == 2
    assert manifest.metrics["student"]["validation"].row("validation").items() <= rows(bundle)[-1].items()
    assert manifest.warnings[0].startswith("the student ends below the cut alone")


def test_the_best_epoch_is_delivered_and_its_line_is_in_the_metrics(teacher: Network, tmp_path: Path) -> None:
    gentle = {
        **SPOILING,
        "method": "lit",
        "optimiser": "sgd",
        "main": {"epochs": 3, "learning_rate": 0.05},
        "finetune": {"epochs": 1},
    }
    bundle = compress(teacher, out=tmp_path / "deploy", **gentle)
    manifest, found = bundle.read_complete(), rows(bundle)
    assert [row["phase"] for row in found] == ["cut", "lit", "lit", "lit", "finetune"]
    best = max(row["validation_top1"] for row in found)
    assert manifest.metrics["student"]["validation"].correct == best
    assert found[manifest.run.delivered or 0]["validation_top1"] == best


def test_measuring_the_cut_changes_no_step(teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither batch norm statistics nor random numbers; the network has batch norms in its sections."""
    quick: dict[str, Any] = {"data": "digits", "student_depth": 8, "device": "cpu", "epochs": 2, "keep": "last"}
    measured = compress(teacher_path, out=tmp_path / "measured", **quick)
    monkeypatch.setattr(Trainer, "_measure_cut", lambda self: None)
    expected = read_checkpoint(compress(teacher_path, out=tmp_path / "expected", **quick).student_path).weights
    found = read_checkpoint(measured.student_path).weights
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def score(top1: float) -> Accuracy:
    return Accuracy(top1=top1, loss=1.0, images=100)


def selection(recipe: Recipe, *phases: TrainingPhase) -> tuple[Selection, Position]:
    position = Position()
    return Selection(TASKS["classification"], recipe, phases, position), position


PHASE = TrainingPhase("main", Phase(epochs=2, learning_rate=0.1), CrossEntropy())


def test_the_later_of_equals_is_kept_and_what_is_no_number_never() -> None:
    student = nn.Linear(1, 1)
    kept, position = selection(Recipe(), PHASE)
    for epoch, top1 in enumerate((0.5, 0.5, float("nan"), 0.4)):
        position.epochs_done = epoch
        nn.init.constant_(student.weight, epoch)
        kept.offer(student, score(top1))
    assert kept.deliver(student, print) == score(0.5)
    assert student.weight.item() == position.best_epoch == 1


def test_a_student_of_another_shape_is_no_candidate() -> None:
    wide, narrow = nn.Linear(2, 2), nn.Linear(1, 1)
    after = TrainingPhase("finetune", PHASE.settings, CrossEntropy(), transition=Removal(0.5))
    kept, position = selection(Recipe(method="slimming"), PHASE, after)
    assert not kept.cut_is_next
    kept.offer(wide, score(0.9))
    assert kept.tensors() == {}
    position.enter(1)
    position.epochs_done = 2
    assert kept.cut_is_next
    kept.offer(narrow, score(0.6))
    assert {name: tuple(value.shape) for name, value in kept.tensors().items()} == {
        "best/weight": (1, 1),
        "best/bias": (1,),
    }


@pytest.mark.parametrize(
    ("recipe", "measured"), [({}, True), ({"init": "fresh"}, False), ({"method": "scratch"}, False)]
)
def test_new_weights_are_no_cut(recipe: dict[str, Any], measured: bool) -> None:
    assert selection(Recipe(**recipe), PHASE)[0].cut_is_next is measured


@pytest.mark.parametrize(
    ("student", "cut", "teacher", "steps", "found"),
    [
        (0.8, 0.6, 0.9, 20, []),
        (0.5, 0.6, 0.9, 20, ["the student ends below the cut alone: 50.00 % on validation, and 60.00 % before"]),
        (0.0, None, 0.9, 20, ["the student ends hardly better than guessing (10%): 0.00 % on validation, and its tea"]),
        (0.1, None, 0.1, 20, []),  # the teacher itself guesses
        (0.1, None, None, 20, ["the student ends hardly better than guessing (10%): 10.00 % on validation. Try"]),
        (0.8, None, 0.9, 2, ["an epoch has only 2 steps of 128. Give more data, more epochs, or a smaller batch"]),
    ],
)
def test_the_user_is_warned(
    student: float, cut: float | None, teacher: float | None, steps: int, found: list[str]
) -> None:
    kept, position = selection(Recipe(keep="last"), PHASE)
    position.validation, position.cut = score(student), None if cut is None else score(cut)
    before = None if teacher is None else score(teacher)
    data = cast(Data, SimpleNamespace(classes=tuple("0123456789"), train=range(128 * steps)))
    warnings = kept.warnings(Recipe().filled("sgd"), data, before)
    assert [text.startswith(each) for text, each in zip(warnings, found, strict=True)] == [True] * len(found)


class Stopped(Progress):
    """Interrupts when the second epoch begins."""

    def on_train_epoch_start(self, phase: str, epoch: int, epochs: int, samples: int, done: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt


def test_a_checkpoint_from_before_there_was_a_best_is_resumed(teacher: Network, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        compress(teacher, out=tmp_path, progress=Stopped(), **SPOILING)
    bundle = Bundle(tmp_path)
    (path,) = bundle.checkpoints_path.iterdir()
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["litdeploy-run"])
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("best/")}  # noqa: SIM118
    for name in ("cut", "best", "best_epoch"):
        assert facts["position"].pop(name) is not None
    del facts["position"]["rows"][0]
    del facts["identity"]["recipe"]["keep"]
    content = save(tensors, {"litdeploy-run": json.dumps(facts)})
    path.unlink()
    path.with_name(f"{path.name[:25]}{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)
    manifest = compress(teacher, out=tmp_path, resume=True, **SPOILING).read_complete()
    assert "cut" not in manifest.metrics
    assert manifest.run.delivered == 2
    assert [row["epoch"] for row in rows(bundle)] == [1, 2]
