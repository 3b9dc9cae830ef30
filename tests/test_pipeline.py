from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from litdeploy.config.target import Target, Timing
from litdeploy.errors import BundleError, CheckpointError, NetworkError
from litdeploy.evaluation import evaluate
from litdeploy.evaluation.verify import verify
from litdeploy.pipeline import deploy
from litdeploy.storage.bundle import Bundle
from litdeploy.trainer import Progress, train

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


def test_a_missing_teacher_gets_a_message(deployed: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        deploy(tmp_path / "gone.pt", out=deployed.path, **QUICK)


@pytest.fixture
def reviews(tmp_path: Path) -> dict[str, Any]:
    """Settings of texts whose class is in one word."""
    words = ("dull and slow", "warm and witty")
    for split, count in (("train", 256), ("test", 64)):
        rows = [(f"film {row}: {words[row % 2]}, {'so ' * (row % 5)}{words[row % 2]}", row % 2) for row in range(count)]
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("review", "stars"), *rows])
    return {"source": str(tmp_path), "text_column": "review", "label_column": "stars", "text_length": 64}


@pytest.mark.slow
def test_texts_go_the_whole_way(reviews: dict[str, Any], tmp_path: Path) -> None:
    quick: dict[str, Any] = {"data": reviews, "device": "cpu", "batch_size": 16, "precision": "fp32", "compile": "off"}
    network = "vdcnn17,width=8,hidden=16"
    trained = train(network, out=tmp_path / "t.safetensors", epochs=6, learning_rate=0.02, **quick)
    assert trained.test.top1 > 0.9
    bundle, report = deploy(
        trained.path, out=tmp_path / "deploy", student_depth=9, epochs=4, learning_rate=0.02, target=TARGET, **quick
    )
    # On its own texts: the student keeps a part of each section and what the teacher knows.
    assert report.student.accuracy["test"].top1 > 0.9
    assert (report.teacher.name, report.student.name, report.depth_ratio) == ("VDCNN-17", "VDCNN-9", 17 / 9)
    student, onnx = bundle.student_path, bundle.export_path / "student.onnx"
    assert evaluate(onnx, data=reviews).top1 == evaluate(student, data=reviews).top1
    # The length is the network's; the columns' names are the other table's.
    other = tmp_path / "other.csv"
    other.write_text("text,label\n" + "dull and slow,0\nwarm and witty,1\n" * 40)
    found = verify(bundle, target=TARGET, data=str(other))
    assert found.within
    assert [each.error for each in found.differences] == ["compression", "conversion"]


def test_a_language_model_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2, eos_token_id=7)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(NetworkError, match=r"generates text token by token.*--transformers DIR"):
        deploy(tmp_path / "gpt2", data="texts.txt", student_depth=1, out=tmp_path / "deploy")
    assert not (tmp_path / "deploy").exists()
