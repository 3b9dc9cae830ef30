"""The whole way of networks of texts, without labels, as `test_any_network.py` of images: each a tiny BERT or GPT-2."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import litdeploy
from litdeploy.config.target import Target, Timing
from litdeploy.errors import NetworkError
from litdeploy.evaluation import evaluate
from litdeploy.evaluation.verify import verify
from litdeploy.pipeline import deploy
from litdeploy.profiler.report.page import render
from litdeploy.profiler.schema import Report
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Measures

transformers = pytest.importorskip("transformers")

WORDS = ("good", "fine", "bad", "poor", "film", "plot", "the", "a", "was", "and")
TARGET = Target(device="cpu", runners=("eager",), batch_sizes=(1,), timing=Timing(warmup_ms=1, samples=8))
QUICK: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "compile": "off",
    "batch_size": 16,
    "epochs": 2,
    "target": TARGET,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text a line, without labels."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(120)))
    return path


def saved(folder: Path, bert_folder: Path, kind: Any, **settings: Any) -> Path:
    """A folder as transformers saves it: a tiny BERT of this kind with its tokenizer."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4}
    config = transformers.BertConfig(
        vocab_size=20, max_position_embeddings=16, initializer_range=0.3, **small, **settings
    )
    kind(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(bert_folder).save_pretrained(folder)
    return folder


def check(bundle: Bundle, report: Report, task: str, texts: Path, teacher: Path) -> Measures:
    """Check the bundle and the report of an unlabeled run; the student's score on the test split."""
    manifest = bundle.read_complete()
    assert manifest.student.task_name == manifest.teacher.spec.task_name == task
    assert (manifest.recipe.alpha, manifest.metrics["teacher"]) == (0, {})
    score = manifest.metrics["student"]["test"]
    assert isinstance(score, Measures)
    assert score.task == task
    assert report.student.measures["test"] == score
    assert "not compared with labels" in report.verdict
    assert f"{next(iter(score.values.values())):.2f}"[:3] in render(report)
    for path in (bundle.path, bundle.export_path / "student.onnx"):
        found = evaluate(path, data=str(texts), teacher=teacher)
        assert isinstance(found, Measures)
        assert found.values == pytest.approx(score.values, abs=2e-3)
    verified = verify(bundle, target=TARGET)
    assert verified.within
    assert [each.error for each in verified.differences] == ["compression", "conversion"]
    assert verified.differences[0].measures is not None
    return score


@pytest.mark.slow
def test_an_embedder(tmp_path: Path, bert_folder: Path, texts: Path) -> None:
    teacher = saved(tmp_path / "teacher", bert_folder, transformers.BertModel)
    blocks = {"student_blocks": {"transformer.encoder.layer": 2}}
    bundle, report = deploy(teacher, out=tmp_path / "deploy", data=str(texts), **{**QUICK, **blocks})
    score = check(bundle, report, "embedding", texts, teacher)
    assert score.values.keys() == {"cosine", "neighbors", "spearman"}
    parity = bundle.read().artefacts["onnx"].details["parity"]
    assert min(batch["cosines"][0] for batch in parity["batches"]) > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), [("Token", "tokens"), ("Sequence", "classification")])
def test_a_classifier(kind: str, task: str, tmp_path: Path, bert_folder: Path, texts: Path) -> None:
    build = getattr(transformers, f"BertFor{kind}Classification")
    teacher = saved(tmp_path / "teacher", bert_folder, build, num_labels=3)
    blocks = {"student_blocks": {"bert.encoder.layer": 2}}
    bundle, report = deploy(teacher, out=tmp_path / "deploy", data=str(texts), **{**QUICK, **blocks})
    score = check(bundle, report, task, texts, teacher)
    assert score.values.keys() == {"agreement", "divergence"}


def test_a_causal_language_model_leaves_in_the_form_of_transformers(
    tmp_path: Path, bert_folder: Path, texts: Path
) -> None:
    torch.manual_seed(0)
    small = {"n_embd": 16, "n_head": 2, "n_layer": 4, "n_positions": 16, "initializer_range": 0.3}
    config = transformers.GPT2Config(vocab_size=20, pad_token_id=0, bos_token_id=2, eos_token_id=3, **small)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "teacher")
    transformers.AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path / "teacher")
    settings = {key: value for key, value in QUICK.items() if key != "target"} | {
        "student_blocks": {"transformer.h": 2},
        "data": str(texts),
    }
    bundle = litdeploy.compress(tmp_path / "teacher", out=tmp_path / "deploy", **settings)
    score = bundle.read().metrics["student"]["test"]
    assert isinstance(score, Measures)
    assert score.values.keys() == {"agreement", "divergence", "perplexity", "teacher_perplexity"}
    found = evaluate(bundle.path)
    assert isinstance(found, Measures)
    assert found.values == pytest.approx(score.values, rel=1e-3)
    with pytest.raises(NetworkError, match=r"GPT2LMHeadModel generates.* --transformers DIR"):
        litdeploy.export(bundle, onnx=True, target=TARGET)
