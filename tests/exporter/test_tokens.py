"""A text classifier as transformers published it, compressed; its folder is moved, and all that follows goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from litdeploy.config.spec import TokenInput
from litdeploy.config.target import Target, Timing
from litdeploy.errors import BundleError, DataError
from litdeploy.evaluation import evaluate
from litdeploy.evaluation.verify import verify
from litdeploy.exporter import export
from litdeploy.inspection import FoundNetwork, inspect
from litdeploy.networks import load
from litdeploy.pipeline import deploy
from litdeploy.profiler import profile
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Accuracy
from litdeploy.trainer import compress, train

TARGET = Target(
    device="cpu",
    runners=("eager",),
    batch_sizes=(1, 8),
    timing=Timing(warmup_ms=1, samples=8, max_seconds=1),
)


class Published(NamedTuple):
    """Where the teacher is now, and the bundle that was made of it before."""

    folder: Path
    bundle: Bundle


@pytest.fixture(scope="module")
def published(bert_folder: Path, reviews_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    place = tmp_path_factory.mktemp("published")
    folder = place / "model"
    shutil.copytree(bert_folder, folder)
    given: dict[str, Any] = {
        "data": {"source": str(reviews_path), "text_length": 16},
        "optimiser": "adamw",
        "batch_size": 16,
        "precision": "fp32",
        "device": "cpu",
        "main": {"epochs": 8, "learning_rate": 5e-3},
        "finetune": {"epochs": 1, "learning_rate": 5e-4},
    }
    trained = train(f"hf:{folder}", out=place / "trained.safetensors", **given)
    module: Any = load(trained.path).module
    module.config.id2label = {0: "better", 1: "worse"}
    module.save_pretrained(folder)
    given["main"] = {"epochs": 1, "learning_rate": 1e-3}
    bundle = compress(folder, student_depth=2, out=place / "deploy", **given)
    return Published(folder.rename(place / "moved"), bundle)


@pytest.fixture(scope="module")
def exported(published: Published) -> Bundle:
    """In int8, by way of the file in fp32."""
    export(published.bundle, precisions=("int8",), calibration_images=64, target=TARGET)
    return published.bundle


def test_export_and_evaluation(exported: Bundle, reviews_path: Path) -> None:
    manifest = exported.read()
    artefact = manifest.artefacts["onnx-int8"]
    assert artefact.details["inputs"] == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    assert artefact.details["parity"]["within"]
    assert artefact.details["calibration"]["images"] == 64
    assert manifest.student.classes == ("better", "worse")
    whole = evaluate(exported.path, device="cpu")
    assert isinstance(whole, Accuracy)
    assert whole.top1 > 0.9
    assert whole == evaluate(exported.student_path, data=str(reviews_path), device="cpu")
    # Its metadata say how long its texts are, and the bundle that it lies in has the tokeniser.
    found = evaluate(exported.export_path / "student.int8.onnx", data=str(reviews_path), device="cpu")
    assert isinstance(found, Accuracy)
    assert found.top1 == whole.top1
    assert found.loss == pytest.approx(whole.loss, abs=0.02)
    with pytest.raises(DataError, match=r"elsewhere: no tokenizer"):
        evaluate(exported.path, data={"tokenizer": "else/elsewhere"}, device="cpu")


def test_the_teacher_where_it_is_now(published: Published, exported: Bundle, reviews_path: Path) -> None:
    bundle, folder = exported, published.folder
    found = inspect(folder)
    assert isinstance(found, FoundNetwork)
    assert (found.student_depths, found.class_names) == ((1, 2, 3, 4), ("better", "worse"))
    own = evaluate(folder, data={"source": str(reviews_path), "text_length": 16}, device="cpu")
    assert own == bundle.read().metrics["teacher"]["test"]
    verified = verify(bundle, teacher=folder, target=TARGET)
    assert verified.within
    assert [each.error for each in verified.differences] == ["compression", "conversion"]
    report = profile(bundle, teacher=folder, target=TARGET)
    assert report.fidelity is not None
    assert [each.name for each in report.fidelity.deviations] == ["stem", "bert.encoder.layer", "logits"]
    assert (report.depth_ratio, report.data.noun) == (2.0, "text")
    with pytest.raises(BundleError, match="--teacher FILE"):
        profile(bundle, target=TARGET)
    # The folder is taken for the teacher that it was; another run would be refused.
    with pytest.raises(BundleError, match="holds another run"):
        deploy(folder, student_depth=1, data=reviews_path, out=bundle.path, device="cpu", target=TARGET)


def test_what_is_timed_is_as_long_as_the_texts(published: Published) -> None:
    network = load(published.bundle.student_path)
    assert network.spec.input == TokenInput(length=16, vocabulary=20)
    batch = network.example(2)
    assert isinstance(batch, dict)
    assert [tensor.shape for tensor in batch.values()] == [(2, 16), (2, 16)]
    shorter = network.example(2, half=True)
    assert isinstance(shorter, dict)
    assert torch.equal(shorter["attention_mask"].sum(1), torch.tensor([8, 6]))
