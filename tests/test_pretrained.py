"""The way out of a bundle to a folder of transformers, with its model card."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import litdeploy
from litdeploy import cli
from litdeploy.config.recipe import DataSettings
from litdeploy.data import prepared
from litdeploy.data.texts import Tokens
from litdeploy.errors import BundleError, StudentError
from litdeploy.networks import load
from litdeploy.networks.embedder import Embedding, write_modules
from litdeploy.pretrained import model_card, save_pretrained
from litdeploy.profiler import read_report
from litdeploy.storage.bundle import Bundle

transformers = pytest.importorskip("transformers")
FIXTURE = Path(__file__).parent / "fixtures" / "bundle-0.1.0" / "classifier"


@pytest.fixture(scope="module")
def bundle(bert_path: Path, reviews_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A student of a tiny BERT, two of its four blocks."""
    short: dict[str, Any] = {
        "main": {"epochs": 1, "learning_rate": 3e-3},
        "finetune": {"epochs": 0, "learning_rate": 1e-3},
    }
    return litdeploy.compress(
        bert_path,
        student_depth=2,
        data={"source": str(reviews_path)},
        out=tmp_path_factory.mktemp("bundle") / "deploy",
        batch_size=16,
        precision="fp32",
        device="cpu",
        **short,
    )


def test_a_bundle_to_a_folder_of_transformers(bundle: Bundle, tmp_path: Path) -> None:
    place = litdeploy.save_pretrained(bundle, tmp_path / "reviews")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(place)
    assert loaded.config.num_hidden_layers == 2
    student = load(bundle.student_path)
    words = transformers.AutoTokenizer.from_pretrained(place)(["good film", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        given = {name: words[name] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(loaded(**words).logits, student.module(**given).logits, rtol=0, atol=1e-5)
    card = (place / "README.md").read_text()
    assert card.startswith("---\n# license: ")
    assert "- `bert.encoder.layer`: the teacher's blocks 0, 3\n" in card
    assert "\n`reviews.csv`: " in card  # no folder of this machine
    assert f"| test | {bundle.read().metrics['teacher']['test'].summary()} |" in card
    assert "## Speed" not in card  # it was not profiled


def test_the_command(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["litdeploy", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    place = tmp_path / "reviews"
    command = ["export", str(bundle.path), "--transformers", str(place)]
    assert main(command) == 0
    assert json.loads((place / "config.json").read_text())["num_hidden_layers"] == 2
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main(["export", str(bundle.path), "--transformers", str(bundle.transformers_path)]) == 2
    assert bundle.read_complete().carried


def test_what_is_no_student_of_transformers(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        save_pretrained(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(StudentError, match="network of resnet"):
        save_pretrained(FIXTURE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_has_the_speed_up_with_its_interval() -> None:
    bundle, report = Bundle(FIXTURE), read_report(FIXTURE / "profile")
    assert report is not None
    card = model_card(bundle.read(), load(bundle.student_path), report, "a `name`\nof two lines")
    assert "\n# a 'name' of two lines\n" in card
    found = report.headline.comparison
    assert report.verdict in card
    assert f"| {found.speedup:.2f}× ({found.speedup_low:.2f}–{found.speedup_high:.2f}) |" in card
    assert "layer1" in card


def test_the_card_names_no_folder_of_this_machine() -> None:
    bundle = Bundle(FIXTURE)
    manifest = bundle.read()
    for folder, named in (
        ("/home/me/.cache/hub/models--some--model-L6/snapshots/abc", "some/model-L6"),
        ("/home/me/my-model", "my-model"),
    ):
        spec = manifest.teacher.spec.with_(name=f"hf:{folder}")
        teacher = manifest.teacher.model_copy(update={"spec": spec})
        report = read_report(FIXTURE / "profile")
        assert report is not None
        report = report.model_copy(update={"verdict": f"hf:{folder} of 3 blocks answers as fast."})
        card = model_card(manifest.model_copy(update={"teacher": teacher}), load(bundle.student_path), report, "x")
        assert f"\n{named} of 3 blocks answers as fast.\n" in card
        assert f"A shallower student of `{named}`" in card
        assert "/home" not in card
        assert ("\nbase_model: some/model-L6\n" in card) == (named == "some/model-L6")


def test_a_sentence_embedder_all_the_way(bert_folder: Path, reviews_path: Path, tmp_path: Path) -> None:
    """From a folder of sentence-transformers and texts alone to a folder of sentence-transformers."""
    library = pytest.importorskip("sentence_transformers")
    teacher = tmp_path / "teacher"
    config = transformers.AutoConfig.from_pretrained(bert_folder)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(teacher)
    transformers.AutoTokenizer.from_pretrained(bert_folder).save_pretrained(teacher)
    write_modules(Embedding(pooling="cls", normalize=True), 16, 12, teacher)
    texts = [line.partition(",")[0] for line in reviews_path.read_text().splitlines()[1:]]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    bundle = litdeploy.compress(
        teacher,
        student_depth=2,
        data=str(tmp_path / "texts.txt"),
        out=tmp_path / "deploy",
        epochs=2,
        batch_size=16,
        precision="fp32",
        device="cpu",
    )
    manifest = bundle.read()
    assert (manifest.student.task, manifest.student.arguments) == ("embedding", {"pooling": "cls"})
    teacher.rename(tmp_path / "moved")  # the bundle needs it no more
    place = save_pretrained(bundle, tmp_path / "student")
    assert (
        "Embeddings are pooled by `cls` from the last hidden states, of length 1." in (place / "README.md").read_text()
    )
    student = load(bundle.student_path)
    tokens = Tokens(DataSettings(tokenizer=str(bundle.transformers_path)), student.spec)
    with torch.no_grad():
        ours = student.module(**prepared(torch.from_numpy(tokens(texts[:9])), student.spec.input))
    theirs = library.SentenceTransformer(str(place), device="cpu").encode(texts[:9], convert_to_tensor=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
