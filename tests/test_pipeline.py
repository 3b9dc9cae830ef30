from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from litdeploy.bundle import Bundle
from litdeploy.errors import BundleError, CheckpointError
from litdeploy.pipeline import deploy
from litdeploy.target import Target, Timing
from litdeploy.trainer import Progress

TARGET = Target(device="cpu", runners=("onnxruntime",), batch_sizes=(1,), timing=Timing(warmup_ms=1, samples=8))
QUICK: dict[str, Any] = {"recipe": "digits-resnet", "student_depth": 8, "epochs": 1, "device": "cpu", "target": TARGET}


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, teacher_path: Path) -> Bundle:
    bundle, report = deploy(teacher_path, out=tmp_path_factory.mktemp("deployed") / "deploy", **QUICK)
    assert report.student.accuracy["test"].images > 0
    return bundle


def test_what_is_whole_is_not_done_again(deployed: Bundle, teacher_path: Path) -> None:
    notes = Notes()
    before = {path: path.stat().st_mtime_ns for path in deployed.path.rglob("*") if path.is_file()}
    deploy(teacher_path, out=deployed.path, progress=notes, **QUICK)
    assert [note.split(": ")[1] for note in notes.notes] == [
        "the student is trained already",
        "exported already",
        "profiled already",
    ]
    assert {path: path.stat().st_mtime_ns for path in deployed.path.rglob("*") if path.is_file()} == before


def test_another_target_profiles_anew(deployed: Bundle, teacher_path: Path) -> None:
    notes = Notes()
    other = TARGET.model_copy(update={"batch_sizes": (2,)})
    _, report = deploy(teacher_path, out=deployed.path, progress=notes, **{**QUICK, "target": other})
    assert report.target == other
    assert not any("profiled already" in note for note in notes.notes)


def test_another_run_is_refused_and_kept(deployed: Bundle, teacher_path: Path) -> None:
    before = deployed.student_path.read_bytes()
    with pytest.raises(BundleError, match="holds another run"):
        deploy(teacher_path, out=deployed.path, seed=7, **QUICK)
    assert deployed.student_path.read_bytes() == before


def test_a_teacher_that_is_gone_is_told(deployed: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        deploy(tmp_path / "gone.pt", out=deployed.path, **QUICK)
