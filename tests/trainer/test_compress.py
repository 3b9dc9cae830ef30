from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import litdeploy
from litdeploy.config.recipe import Augmentation
from litdeploy.errors import DataError, DependencyError, SettingsError, StudentError, TrainingError
from litdeploy.files import sha256_of
from litdeploy.networks import load
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import read_checkpoint
from litdeploy.storage.records import Accuracy
from litdeploy.trainer import Progress, compress
from litdeploy.trainer.progress import Row
from litdeploy.trainer.resolve import resolve_recipe

QUICK: dict[str, Any] = {
    "data": {"source": "digits"},
    "student_depth": 8,
    "epochs": 2,
    "precision": "fp32",
    "main": {"epochs": 1, "learning_rate": 0.05},
    "finetune": {"epochs": 1, "learning_rate": 0.01},
    "augmentation": {"padding": 1, "flip": False},
}


@pytest.mark.parametrize("method", ["lit", "kd", "hint", "scratch"])
def test_every_method_leaves_a_complete_bundle(teacher_path: Path, tmp_path: Path, method: str) -> None:
    before = sha256_of(teacher_path)
    bundle = compress(teacher_path, out=tmp_path / "deploy", method=method, **QUICK)
    manifest = bundle.read_complete()
    rows = [json.loads(line) for line in bundle.metrics_path.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == ([1, 2] if method == "scratch" else [0, 1, 2])
    assert all(0 <= row["validation_top1"] <= 1 for row in rows)
    assert manifest.metrics["student"].keys() == {"validation", "test"}
    assert manifest.metrics["teacher"]["test"].images == manifest.data.images["test"]
    assert manifest.data.test_is_held_out
    assert manifest.student.plan == dict.fromkeys(("layer1", "layer2", "layer3"), (0,))
    student = load(bundle.student_path)
    assert student.spec == manifest.student
    assert len(student.module.layer1) == 1  # type: ignore[arg-type]
    assert sha256_of(teacher_path) == before


def test_a_run_repeats_bit_for_bit(teacher_path: Path, tmp_path: Path) -> None:
    first, again, other = (
        read_checkpoint(compress(teacher_path, out=tmp_path / name, seed=seed, **QUICK).student_path).weights
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_the_teacher_in_memory_is_bit_equal_before_and_after(teacher_path: Path, tmp_path: Path) -> None:
    teacher = load(teacher_path)
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    modes = [module.training for module in teacher.module.modules()]
    grads = [parameter.requires_grad for parameter in teacher.module.parameters()]
    bundle = compress(teacher, out=tmp_path / "deploy", **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    assert [module.training for module in teacher.module.modules()] == modes
    assert [parameter.requires_grad for parameter in teacher.module.parameters()] == grads
    kept = load(bundle.teacher_path)
    assert all(torch.equal(value, before[name]) for name, value in kept.module.state_dict().items())


def load_images(folder: Path) -> int:
    """Training images of the run in `folder`."""
    return Bundle(folder / "deploy").read().data.images["train"]


class Watching(Progress):
    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.images = 0
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def on_train_batch_end(self, samples: int, losses: object) -> None:
        self.images += samples

    def on_validation_end(self, row: Row) -> None:
        self.rows.append(row)


def test_whoever_watches_is_told(teacher_path: Path, tmp_path: Path) -> None:
    watching = Watching()
    compress(teacher_path, out=tmp_path / "deploy", progress=watching, tensorboard=True, **QUICK)
    assert [row["phase"] for row in watching.rows] == ["cut", "lit", "finetune"]
    assert watching.images == 2 * 128 * (load_images(tmp_path) // 128)
    assert any("hardly better than guessing" in note for note in watching.notes)
    assert list((tmp_path / "deploy" / "tensorboard").iterdir())


@pytest.mark.parametrize("method", ["lit", "kd"])
def test_without_labels_the_student_learns_from_its_teacher_alone(
    teacher_path: Path, tmp_path: Path, method: str
) -> None:
    watching = Watching()
    unlabeled = {**QUICK, "data": {"source": "digits", "labels": "none"}, "augmentation": None, "method": method}
    manifest = compress(teacher_path, out=tmp_path / "deploy", progress=watching, **unlabeled).read_complete()
    assert not manifest.data.labeled
    assert manifest.recipe.alpha == 0
    assert manifest.recipe.augmentation == Augmentation(padding=1, flip=False)
    assert manifest.student.classes == load(teacher_path).spec.classes
    assert manifest.metrics["student"].keys() == {"validation", "test"}
    assert not any(isinstance(score, Accuracy) for score in manifest.metrics["student"].values())
    notes = "\n".join(watching.notes)
    assert "no labels: they are left unused; the student learns from its teacher alone (alpha 0)" in notes
    assert "augmentation: crop with 1 pixel of padding, no flip (mirrored digits or letters" in notes


@pytest.mark.parametrize("method", ["scratch", "slimming"])
def test_a_method_that_learns_from_labels_needs_them(teacher_path: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(StudentError, match=rf"--method {method}: its phase .* learns from labels"):
        compress(
            teacher_path,
            out=tmp_path / "deploy",
            method=method,
            **{
                **QUICK,
                "student_depth": 14 if method == "slimming" else 8,
                "data": {"source": "digits", "labels": "none"},
            },
        )


def test_tensorboard_that_is_absent_is_told_before_the_run(
    teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(DependencyError, match="pip install"):
        compress(teacher_path, out=tmp_path / "deploy", tensorboard=True, **QUICK)
    assert not (tmp_path / "deploy").exists()


def test_a_loss_that_is_no_number_stops_the_run(teacher_path: Path, tmp_path: Path) -> None:
    wild = {**QUICK, "main": {"epochs": 1, "learning_rate": 1e20}}
    with pytest.raises(TrainingError, match="--learning-rate"):
        compress(teacher_path, out=tmp_path / "deploy", method="kd", **wild)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": None}, SettingsError, "no data to train on"),
        ({"epochs": 0}, SettingsError, "at least one epoch"),
        ({"student_depth": None}, StudentError, "the student's depth is missing"),
        ({"method": "scratch", "init": "copy"}, StudentError, "copies no blocks"),
        ({"batch_size": 5000}, TrainingError, "fewer than one batch"),
        ({"input_shape": (1, 9, 9)}, DataError, "8"),
    ],
)
def test_what_cannot_be_done_is_refused(
    teacher_path: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compress(teacher_path, out=tmp_path / "deploy", **{**QUICK, **changes})


def test_a_student_cannot_be_compressed_again(teacher_path: Path, tmp_path: Path) -> None:
    bundle = compress(teacher_path, out=tmp_path / "deploy", **QUICK)
    with pytest.raises(StudentError, match="is a student already"):
        compress(bundle.student_path, out=tmp_path / "again", **QUICK)


def test_selective_compression_copies_the_other_sections_whole(teacher_path: Path, tmp_path: Path) -> None:
    changes = {**QUICK, "student_depth": None, "student_blocks": {"layer2": 1}}
    bundle = compress(teacher_path, out=tmp_path / "deploy", **changes)
    student = load(bundle.student_path).module
    assert [len(getattr(student, name)) for name in ("layer1", "layer2", "layer3")] == [2, 1, 2]


def own_network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4))),
        nn.Linear(16, 10),
    )


def test_a_users_own_module(tmp_path: Path) -> None:
    teacher = litdeploy.load(own_network(), input_shape=(1, 8, 8), normalise="half")
    bundle = litdeploy.compress(teacher, out=tmp_path / "deploy", **{**QUICK, "student_depth": 2})
    assert bundle.read().student.plan == {"2": (0, 3)}
    assert load(bundle.student_path, network=own_network()).class_count() == 10


def test_changes_are_laid_over_the_recipe() -> None:
    found = resolve_recipe("digits-resnet", {"epochs": 20, "learning_rate": 0.2, "student_blocks": {"layer1": 2}})
    assert (found.main.epochs, found.finetune.epochs, found.main.learning_rate) == (16, 4, 0.2)
    assert (found.student_depth, found.student_blocks) == (None, {"layer1": 2})
    assert found.data.source == "digits"


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_features_are_kept_over_epochs_and_not_beyond_the_run(teacher_path: Path, tmp_path: Path) -> None:
    notes = Notes()
    bundle = compress(teacher_path, out=tmp_path / "deploy", feature_cache=1, progress=notes, **QUICK)
    assert any(note.startswith("feature cache: 1 view of 1,3") and "1 of 2 epochs" in note for note in notes.notes)
    assert bundle.read_complete().recipe.feature_cache == 1
    assert not (bundle.path / "features").exists()


def kept_in(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Which slots are filled, and their logits; the last one is nobody's."""
    filled = torch.frombuffer(bytearray((folder / "filled.bin").read_bytes()), dtype=torch.uint8).bool()
    logits = torch.frombuffer(bytearray((folder / "logits.bin").read_bytes()), dtype=torch.float32).view(-1, 10)
    return filled, logits[:-1]


def test_features_serve_further_students_of_the_same_teacher_and_data(teacher_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    shared = {**QUICK, "feature_cache": 1, "feature_cache_dir": folder}
    compress(teacher_path, out=tmp_path / "a", **shared)
    filled, before = kept_in(folder)
    compress(teacher_path, out=tmp_path / "b", **{**shared, "method": "kd"})
    still_filled, after = kept_in(folder)
    assert filled.sum() > 1000
    assert still_filled[filled].all()
    assert torch.equal(after[filled], before[filled])
    with pytest.raises(TrainingError, match=r"\(augmentation differ\).*--feature-cache-dir"):
        compress(teacher_path, out=tmp_path / "c", **{**shared, "augmentation": {"padding": 2, "flip": False}})
