"""Students of transformers as folders: tiny networks with random weights, one of each class, without their blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litdeploy.batch import forward
from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import TokenInput
from litdeploy.data.texts import Tokens
from litdeploy.errors import BundleError, ParityError, StudentError
from litdeploy.exporter.pretrained import write_pretrained
from litdeploy.networks import Network, load
from litdeploy.networks.embedder import SentenceEmbedder
from litdeploy.networks.hub import write_configuration
from litdeploy.networks.student import make_student

transformers = pytest.importorskip("transformers")

CARD = "---\ntags:\n- litdeploy\n---\n\n# a student\n"
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 5,
    "initializer_range": 0.3,  # so that each block matters
}
TEXT: dict[str, Any] = {"vocab_size": 20, "max_position_embeddings": 32, "pad_token_id": 0, **SIZES}
MODERN = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 4}
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, tuple[int, ...]]]] = {
    "BertForSequenceClassification": ("BertConfig", TEXT, "num_hidden_layers", {"bert.encoder.layer": (0, 2, 4)}),
    "BertForTokenClassification": ("BertConfig", TEXT, "num_hidden_layers", {"bert.encoder.layer": (0, 3)}),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 20, "n_positions": 32, "n_embd": 16, "n_layer": 4, "n_head": 2, "eos_token_id": 3},
        "n_layer",
        {"transformer.h": (0, 1, 3)},
    ),
    "ModernBertForMaskedLM": ("ModernBertConfig", {**TEXT, **MODERN}, "num_hidden_layers", {"model.layers": (0, 2, 3)}),
    "ViTForImageClassification": (
        "ViTConfig",
        {"image_size": 8, "patch_size": 4, **SIZES},
        "num_hidden_layers",
        {"vit.layers": (0, 4)},
    ),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        {
            "depths": [2, 3, 2, 2],
            "hidden_sizes": [8, 16, 16, 16],
            "num_attention_heads": [1, 2, 2, 2],
            "decoder_hidden_size": 16,
            "initializer_range": 0.3,
        },
        "depths",
        {"segformer.stages.1.blocks": (0, 2), "segformer.stages.3.blocks": (0,)},
    ),
    "Wav2Vec2ForSequenceClassification": (
        "Wav2Vec2Config",
        {
            "conv_dim": (8, 8),
            "conv_kernel": (10, 8),
            "conv_stride": (5, 4),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 8,
            "vocab_size": 10,
            **SIZES,
        },
        "num_hidden_layers",
        {"wav2vec2.encoder.layers": (0, 1, 4)},
    ),
}


def student_of(folder: Path, plan: dict[str, tuple[int, ...]], **given: Any) -> Network:
    """The student with these blocks of the network in a folder."""
    teacher = load(folder, **given)
    return Network(make_student(teacher.module, plan).eval(), teacher.spec.with_(plan=plan), str(folder))


def carried(student: Network, tmp_path: Path) -> Path:
    """The folder for transformers that a bundle has."""
    (tmp_path / "carried").mkdir()
    write_configuration(student.module, student.spec.name, tmp_path / "carried")
    return tmp_path / "carried"


def same(ours: Any, theirs: Any) -> bool:
    """Whether two outputs are the same, to 1e-5 of their scale."""
    one, other = (each if isinstance(each, Tensor) else each[0] for each in (ours, theirs))
    return bool((one - other).abs().max() <= 1e-5 * one.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_from_pretrained_loads_the_student(name: str, tmp_path: Path) -> None:
    kind, sizes, depth, plan = CASES[name]
    torch.manual_seed(0)
    getattr(transformers, name)(getattr(transformers, kind)(**sizes)).save_pretrained(tmp_path / "teacher")
    if name.startswith("Segformer"):
        stated = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2], "size": {"height": 32, "width": 32}}
        (tmp_path / "teacher" / "preprocessor_config.json").write_text(json.dumps(stated))
    given = {"input_shape": (400,)} if name.startswith("Wav2Vec2") else {}
    student = student_of(tmp_path / "teacher", plan, **given)
    write_pretrained(student, carried(student, tmp_path), tmp_path / "student", CARD, overwrite=False)
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "student")
    batch = student.example()
    with torch.no_grad():
        assert same(forward(student.module, batch), forward(loaded, batch))
    for path, kept in plan.items():
        stated = getattr(loaded.config, depth)
        assert (stated if isinstance(stated, int) else stated[int(path.split(".")[-2])]) == len(kept)
    assert loaded.config.architectures == [name]
    assert getattr(loaded.config, "use_cache", True)
    # litdeploy itself finds the class again.
    again = load(tmp_path / "student", **given)
    with torch.no_grad():
        assert same(forward(student.module, batch), forward(again.module, batch))


def test_blocks_that_a_configuration_does_not_have(tmp_path: Path) -> None:
    """ModernBERT's first block has no norm of its own, and no other block is built like it."""
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(**{**TEXT, **MODERN})
    transformers.ModernBertForMaskedLM(config).save_pretrained(tmp_path / "teacher")
    student = student_of(tmp_path / "teacher", {"model.layers": (0, 2)})
    del student.module.model.layers[0]
    student = Network(student.module, student.spec.with_(plan={"model.layers": (2,)}), "student")
    with pytest.raises(StudentError, match=r"blocks that the student keeps \(2 of model.layers\).*first ones \(0 of"):
        write_pretrained(student, None, tmp_path / "student", CARD, overwrite=False)
    assert not (tmp_path / "student").exists()


def test_a_network_that_is_not_of_transformers(tmp_path: Path, teacher_path: Path) -> None:
    with pytest.raises(StudentError, match=r"network of resnet.*--onnx"):
        write_pretrained(load(teacher_path), None, tmp_path / "student", CARD, overwrite=False)


@pytest.fixture
def bert(tmp_path: Path) -> Network:
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)).save_pretrained(tmp_path / "teacher")
    return student_of(tmp_path / "teacher", {"bert.encoder.layer": (0, 4)})


def test_nothing_of_the_users_is_replaced(bert: Network, tmp_path: Path) -> None:
    place = tmp_path / "student"
    place.mkdir()
    write_pretrained(bert, None, place, CARD, overwrite=False)  # an empty folder
    with pytest.raises(BundleError, match=r"holds an earlier student.*--overwrite"):
        write_pretrained(bert, None, place, CARD, overwrite=False)
    write_pretrained(bert, None, place, CARD + "again\n", overwrite=True)
    assert (place / "README.md").read_text().endswith("again\n")
    (place / "notes.md").write_text("mine")
    with pytest.raises(BundleError, match=r"did not write .notes.md.; they are kept"):
        write_pretrained(bert, None, place, CARD, overwrite=True)
    (place / "notes.md").unlink()
    (place / "README.md").write_text("# another model\n")
    with pytest.raises(BundleError, match="did not write"):
        write_pretrained(bert, None, place, CARD, overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_loads_as_something_else_does_not_appear(
    bert: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(bert.module)
    monkeypatch.setattr(kind, "save_pretrained", _saving_other_weights(kind.save_pretrained))
    with pytest.raises(ParityError, match="computes something else than the student"):
        write_pretrained(bert, None, tmp_path / "student", CARD, overwrite=False)
    assert not (tmp_path / "student").exists()


def _saving_other_weights(save: Any) -> Any:
    def wrong(module: Any, place: Path) -> None:
        with torch.no_grad():
            module.bert.encoder.layer[1].output.dense.weight.mul_(1.01)
        save(module, place)

    return wrong


def sentence_folder(tmp_path: Path, bert_folder: Path, pooling: str = "mean", normalize: bool = True) -> Path:
    """A folder as sentence-transformers saves it, of a tiny BERT."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    encoder = tmp_path / "encoder"
    transformers.AutoTokenizer.from_pretrained(bert_folder).save_pretrained(encoder)
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(encoder)
    parts = [Transformer(str(encoder), max_seq_length=10), Pooling(16, pooling), *([Normalize()] if normalize else [])]
    whole = library.SentenceTransformer(modules=parts, device="cpu")
    whole.save_pretrained(str(tmp_path / "st"), create_model_card=False)
    return tmp_path / "st"


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens"])
def test_sentence_transformers_loads_an_embedder(pooling: str, tmp_path: Path, bert_folder: Path) -> None:
    folder = sentence_folder(tmp_path, bert_folder, pooling, normalize=pooling == "mean")
    student = student_of(folder, {"transformer.encoder.layer": (0, 2, 4)})
    assert isinstance(student.module, SentenceEmbedder)
    assert (student.module.embedding.pooling, student.module.embedding.normalize) == (pooling, pooling == "mean")
    assert student.spec.input == TokenInput(length=10, vocabulary=20)
    place = carried(student, tmp_path)
    Tokens(DataSettings(), student.spec).save(place)
    write_pretrained(student, place, tmp_path / "student", CARD, overwrite=False)
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(tmp_path / "student"), device="cpu")
    assert loaded.max_seq_length == 10
    assert loaded.encode("the plot was good").shape == (16,)
    assert len(loaded[0].model.encoder.layer) == 3


def test_files_are_readable_like_any_other(bert: Network, tmp_path: Path) -> None:
    write_pretrained(bert, None, tmp_path / "student", CARD, overwrite=False)
    (tmp_path / "other").write_text("")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "student").iterdir()}
    assert set(modes.values()) == {(tmp_path / "other").stat().st_mode}


def test_a_stage_without_blocks(tmp_path: Path) -> None:
    """SegFormer's configuration has stages of no block."""
    torch.manual_seed(0)
    sizes = CASES["SegformerForSemanticSegmentation"][1]
    transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**sizes)).save_pretrained(
        tmp_path / "teacher"
    )
    given: dict[str, Any] = {"input_shape": (3, 32, 32), "normalise": "half"}
    student = student_of(tmp_path / "teacher", {"segformer.stages.1.blocks": ()}, **given)
    write_pretrained(student, None, tmp_path / "student", CARD, overwrite=False)
    loaded = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "student")
    assert loaded.config.depths == [2, 0, 2, 2]
