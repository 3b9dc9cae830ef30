"""A text classifier of transformers on tokenised texts: trained, compressed, stopped and gone on with."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litdeploy.config.spec import TokenInput
from litdeploy.config.target import Target, Timing
from litdeploy.errors import BundleError, InterruptedRun, NetworkError
from litdeploy.networks import load, new
from litdeploy.profiler import profile
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import read_checkpoint, write_checkpoint
from litdeploy.trainer import Progress, compress, train

Compress = Callable[..., Bundle]
GIVEN: dict[str, Any] = {
    "student_depth": 2,
    "main": {"epochs": 1, "learning_rate": 3e-3},
    "finetune": {"epochs": 1, "learning_rate": 3e-4},
    "optimiser": "adamw",
    "batch_size": 16,
    "precision": "fp32",
    "device": "cpu",
}
STEPS = 8  # an epoch: 136 of the 160 texts are trained on


class Notes(Progress):
    """Keeps what it is told; stops the run as its user would, after so many steps."""

    def __init__(self, stop: int | None = None) -> None:
        self.lines: list[str] = []
        self.steps, self._stop = 0, stop

    def note(self, text: str) -> None:
        self.lines.append(text)

    def on_train_batch_end(self, samples: int, losses: object) -> None:
        self.steps += 1
        if self._stop is not None and self.steps == self._stop:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def bert(bert_path: Path, reviews_path: Path, tmp_path: Path) -> Compress:
    """Compresses the BERT into the folder of this name."""

    def call(name: str = "deploy", **changes: Any) -> Bundle:
        data = {"source": str(reviews_path), **changes.pop("data", {})}
        return compress(bert_path, data=data, out=tmp_path / name, **{**GIVEN, **changes})

    return call


def weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    return read_checkpoint(bundle.student_path).weights


def same(one: Bundle, other: Bundle) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_bundle_is_whole_without_the_folder_that_it_came_from(bert: Compress, bert_folder: Path) -> None:
    told = Notes()
    bundle = bert(data={"text_length": 10}, progress=told)
    manifest = bundle.read_complete()
    assert manifest.student.input == TokenInput(length=10, vocabulary=20)
    assert manifest.student.plan == {"bert.encoder.layer": (0, 3)}
    assert manifest.data.tokenizer is not None
    assert set(manifest.carried) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(manifest.metrics["student"]) == {"validation", "test"}
    # Its one section runs in the student's own chain: no mask need be kept with the teacher's features.
    assert any(line.startswith("feature cache: 1 view of 136 texts") for line in told.lines)
    transformers = pytest.importorskip("transformers")
    carried, original = (
        transformers.AutoTokenizer.from_pretrained(each) for each in (bundle.transformers_path, bert_folder)
    )
    assert carried("a good film")["input_ids"] == original("a good film")["input_ids"]
    (bundle.transformers_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: missing, or altered"):
        bundle.read()


@pytest.mark.parametrize("method", ["kd", "hint", "scratch", "born-again"])
def test_other_methods(bert: Compress, method: str) -> None:
    depth = None if method == "born-again" else 2
    changes: dict[str, Any] = {"born_again": {"generations": 2}} if method == "born-again" else {}
    bundle = bert(method=method, student_depth=depth, **changes)
    rows = [json.loads(line) for line in bundle.metrics_path.read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["phase"] != "cut"]
    assert losses
    assert torch.isfinite(torch.tensor(losses)).all()


def test_sections_apart_from_the_chain_learn_from_kept_features(bert: Compress) -> None:
    """The masks are computed again for each batch: with those of another batch the losses would differ."""
    changes: dict[str, Any] = {
        "beta": 0,
        "main": {"epochs": 3, "learning_rate": 3e-3},
        "finetune": {"epochs": 0, "learning_rate": 1e-3},
        "sections": 2,
        "precision": "bf16",  # as which features are kept
    }
    told = Notes()
    rows = []
    for name, cache in (("kept", 1), ("new", "off")):
        bundle = bert(name, feature_cache=cache, progress=told, **changes)
        rows.append([json.loads(line) for line in bundle.metrics_path.read_text().splitlines()])
    assert any(line.startswith("feature cache: 1 view of 136 texts") for line in told.lines)
    losses = [[row["loss"] for row in each if row.get("phase") == "lit"] for each in rows]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_kept_logits_change_nothing(bert: Compress) -> None:
    of_logits = {
        "method": "kd",
        "finetune": {"epochs": 0, "learning_rate": 1e-3},
        "main": {"epochs": 2, "learning_rate": 1e-3},
    }
    assert same(bert("with", feature_cache=1, **of_logits), bert("without", feature_cache="off", **of_logits))


def test_a_chain(bert: Compress) -> None:
    bundle = bert(student_depth=(3, 2))
    for each in (bundle, bundle.in_chain(3)):
        assert "tokenizer.json" in each.read_complete().carried
    assert load(bundle.student_path).spec.plan == {"bert.encoder.layer": (0, 3)}


def test_dropout_follows_the_seed(bert: Compress) -> None:
    one = bert("one")
    torch.rand(7)  # whatever else drew before
    assert same(one, bert("again"))
    assert not same(one, bert("other", seed=1))


def test_a_run_that_is_stopped_goes_on_to_the_same_student(bert: Compress, bert_folder: Path, tmp_path: Path) -> None:
    whole = bert("whole")
    with pytest.raises(InterruptedRun, match="--resume"):
        bert(progress=Notes(stop=STEPS + 3))
    other = tmp_path / "other"
    shutil.copytree(bert_folder, other)
    content = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**content, "truncation_side": "left"}))
    with pytest.raises(BundleError, match="tokenizer: "):
        bert(resume=True, data={"tokenizer": str(other)})
    # The same tokeniser elsewhere is no other.
    moved = tmp_path / "moved"
    shutil.copytree(bert_folder, moved)
    found = bert(resume=True, data={"tokenizer": str(moved)})
    assert same(found, whole)
    assert not found.checkpoints_path.exists()
    with pytest.raises(BundleError, match="tokenizer: "):
        bert(resume=True, data={"tokenizer": str(other)})


def test_a_new_teacher_takes_the_classes_of_the_data(bert_folder: Path, reviews_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "teacher.safetensors"
    data = {"source": str(reviews_path), "text_length": 16}
    train(f"hf:{bert_folder}", data=data, out=out, **{**GIVEN, "student_depth": None})
    found = load(out)
    assert (found.spec.name, found.spec.arguments) == (f"hf:{bert_folder}", {"num_labels": 2})
    assert (found.spec.classes, found.spec.input) == (("better", "worse"), TokenInput(length=16, vocabulary=20))


def test_a_folder_that_was_moved_is_named_anew(bert_folder: Path, bert_path: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(bert_folder, moved)
    found = load(bert_path, network=f"hf:{moved}")
    assert found.spec.name == f"hf:{moved}"
    assert torch.equal(found.module.classifier.weight, load(bert_path).module.classifier.weight)
    shutil.rmtree(moved)
    with pytest.raises(NetworkError, match="--network hf:FOLDER"):
        load(bert_path, network=f"hf:{moved}")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("DistilBertConfig", {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32}),
        # It counts positions from the padding's on, and so must know which id that is.
        (
            "RobertaConfig",
            {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32},
        ),
    ],
)
def test_berts_kin(name: str, sizes: dict[str, int], bert_folder: Path, reviews_path: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "folder"
    shutil.copytree(bert_folder, folder)
    getattr(transformers, name)(vocab_size=20, max_position_embeddings=13, pad_token_id=0, **sizes).save_pretrained(
        folder
    )
    teacher = new(f"hf:{folder}", normalise=None, classes=2, seed=0)
    bundle = compress(teacher, data=reviews_path, out=tmp_path / "deploy", **{**GIVEN, "student_depth": 1})
    [kept] = bundle.read_complete().student.plan.values()
    assert kept == (0,)
    found = load(bundle.student_path)
    assert found.spec.input == TokenInput(length=12 if name == "RobertaConfig" else 13, vocabulary=20)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_decoder_trains_and_is_profiled_without_its_cache(
    bert_folder: Path, reviews_path: Path, tmp_path: Path, beta: float
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "llama"
    shutil.copytree(bert_folder, folder)
    transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        num_hidden_layers=4,
        max_position_embeddings=32,
        pad_token_id=0,
    ).save_pretrained(folder)
    made = new(f"hf:{folder}", normalise=None, classes=2, seed=0).within(12)
    path = tmp_path / "teacher.safetensors"
    write_checkpoint(path, made.module.state_dict(), made.spec.with_(classes=("better", "worse")))
    bundle = compress(path, data={"source": str(reviews_path)}, out=tmp_path / "out", **{**GIVEN, "beta": beta})
    rows = [json.loads(line) for line in bundle.metrics_path.read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    report = profile(
        bundle,
        target=Target(device="cpu", runners=("eager",), batch_sizes=(1,), timing=Timing(samples=8, max_seconds=1)),
    )
    assert [each.name for each in report.section_times] == ["model.layers", "stem and head"]
    assert report.fidelity is not None
