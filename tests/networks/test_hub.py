"""Folders of transformers: which class they become, whose weights fit, and what is not taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from litdeploy.config.spec import InputSpec, TensorInput, TokenInput
from litdeploy.errors import CheckpointError, NetworkError
from litdeploy.networks import load
from litdeploy.networks.hub import hub_input, published, transformer_of
from litdeploy.networks.registry import request
from litdeploy.storage.checkpoint import write_checkpoint

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 2}


def bert(**given: Any) -> Any:
    return transformers.BertConfig(vocab_size=20, max_position_embeddings=16, **SIZES, **given)


@pytest.mark.parametrize(
    ("stated", "arguments", "built"),
    [
        ("BertForSequenceClassification", "", "BertForSequenceClassification"),
        ("BertForTokenClassification", "", "BertForTokenClassification"),
        ("BertForMaskedLM", "", "BertForMaskedLM"),
        ("BertLMHeadModel", "", "BertLMHeadModel"),
        ("BertForPreTraining", "", "BertModel"),
        ("BertModel", "", "BertModel"),
        ("BertForMaskedLM", ",num_labels=3", "BertForSequenceClassification"),
        ("BertForTokenClassification", ",num_labels=3", "BertForTokenClassification"),
        ("BertForMaskedLM", ",pooling=max", "BertModel"),
        (None, "", "BertForSequenceClassification"),
    ],
)
def test_architectures_decides_the_class(stated: str | None, arguments: str, built: str, tmp_path: Path) -> None:
    bert(architectures=stated and [stated]).save_pretrained(tmp_path)
    assert type(transformer_of(request(f"hf:{tmp_path}{arguments}").build())).__name__ == built


@pytest.mark.parametrize("stated", ["BertForQuestionAnswering", "BertForMultipleChoice"])
def test_a_head_that_is_not_taken(stated: str, tmp_path: Path) -> None:
    bert(architectures=[stated]).save_pretrained(tmp_path)
    with pytest.raises(NetworkError, match=f"its configuration is of {stated}, which litdeploy does not take"):
        request(f"hf:{tmp_path}").build()


@pytest.mark.parametrize("saved", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_weights_with_the_prefix_of_the_base_or_without_it(saved: str, tmp_path: Path) -> None:
    """The weights of any BERT fit its encoder; what a head or a pooler adds is left out."""
    torch.manual_seed(0)
    module = getattr(transformers, saved)(bert()).eval()
    module.save_pretrained(tmp_path)
    found = load(tmp_path / "model.safetensors", network=f"hf:{tmp_path},pooling=cls")
    batch = found.example()
    with torch.no_grad():
        expected = (module if saved == "BertModel" else module.bert)(**batch)[0][:, 0]
        torch.testing.assert_close(found.module(**batch), expected)


def test_weights_that_lack_a_head(tmp_path: Path) -> None:
    transformers.BertModel(bert()).save_pretrained(tmp_path)
    bert(architectures=["BertForTokenClassification"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing: classifier\.weight, classifier\.bias\n"):
        load(tmp_path)


def test_a_classifier_whose_folder_has_the_configuration_of_its_origin(tmp_path: Path) -> None:
    """As bundles of earlier versions may have it: the class did not follow from `architectures` then."""
    bert(architectures=["BertForMaskedLM"], num_labels=3).save_pretrained(tmp_path)
    module = transformers.BertForSequenceClassification(bert(num_labels=3)).eval()
    weights = tmp_path / "weights.safetensors"
    plain = load(module, input=TokenInput(length=16, vocabulary=20)).spec.with_(name=f"hf:{tmp_path}")
    write_checkpoint(weights, module.state_dict(), plain)
    torch.save(module.state_dict(), tmp_path / "plain.pt")
    for found in (load(weights), load(tmp_path / "plain.pt", network=f"hf:{tmp_path}")):
        assert (found.class_count(), found.spec.arguments) == (3, {"num_labels": 3})
        assert torch.equal(found.module(**found.example()).logits, module(**found.example()).logits)


def test_weights_in_half_precision_are_computed_in_float32(tmp_path: Path) -> None:
    transformers.BertForSequenceClassification(bert()).half().save_pretrained(tmp_path)
    assert {value.dtype for value in load(tmp_path).module.parameters()} == {torch.float32}


def test_caches_are_off(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2, eos_token_id=7)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    found = load(tmp_path)
    assert found.module(**found.example()).past_key_values is None
    # Its configuration has no token for padding.
    assert found.spec.input == TokenInput(length=16, vocabulary=20, pad=7)


def test_images_are_normalized_as_the_folder_says(tmp_path: Path) -> None:
    transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SIZES)).save_pretrained(
        tmp_path
    )
    assert load(tmp_path).spec.input == InputSpec(shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 99, "width": 99}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    assert load(tmp_path).spec.input == InputSpec(shape=(3, 8, 8), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def test_audio_is_a_second_of_samples() -> None:
    config = transformers.Wav2Vec2Config(conv_dim=(8,), conv_kernel=(10,), conv_stride=(5,), num_feat_extract_layers=1)
    with torch.device("meta"):
        assert hub_input(transformers.Wav2Vec2ForSequenceClassification(config)) == TensorInput.of(
            (16_000,), "input_values"
        )


def test_a_pipeline_of_several_networks(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(CheckpointError, match="a pipeline of several networks"):
        load(tmp_path)


def test_a_name_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="hf download some/model"):
        load("some/model")
    root = tmp_path / "models--some--model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    # As the cache has it: links to files that are named by their hashes.
    transformers.BertModel(bert()).save_pretrained(root / "blobs")
    (root / "snapshots" / "abc").mkdir(parents=True)
    for path in sorted((root / "blobs").iterdir()):
        (root / "snapshots" / "abc" / path.name).symlink_to(path.rename(path.with_name(f"hash-of-{path.stem}")))
    path, name = published("some/model")
    assert (path, name) == (root / "snapshots/abc/model.safetensors", f"hf:{root / 'snapshots/abc'}")
    assert load("some/model").module(**load("some/model").example()).shape == (2, 8)
