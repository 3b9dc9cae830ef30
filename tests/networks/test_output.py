from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput

from litdeploy.config.spec import AnyInput, InputSpec, TokenInput
from litdeploy.errors import NetworkError
from litdeploy.networks import Network, load
from litdeploy.networks.output import answer_of, named_tensors
from litdeploy.storage.checkpoint import write_checkpoint

IMAGES = InputSpec(shape=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
TEXTS = TokenInput(length=6, vocabulary=50)
A, B = torch.zeros(2, 3), torch.ones(2, 4)
Pair = namedtuple("Pair", ["boxes", "scores"])


@dataclass
class _Found:
    boxes: Tensor
    more: dict[str, Tensor]


class Returns(nn.Module):
    """Returns what a function makes of the first input."""

    def __init__(self, function: Any, spec: AnyInput = IMAGES, **attributes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.function, self.input_spec = function, spec
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, images: Tensor | None = None, **several: Tensor) -> Any:
        return self.function((several["input_ids"] if images is None else images) * self.weight)


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (A, ["output"]),
        ((A, B), ["output0", "output1"]),
        ([A, [B, A]], ["output0", "output1.output0", "output1.output1"]),
        ({"a": A, "deep": {"b": B, "name": "text"}, "none": None}, ["a", "deep.b"]),
        (_Found(A, {"classes": B}), ["boxes", "more.classes"]),
        (Pair(A, B), ["boxes", "scores"]),
        (SequenceClassifierOutput(loss=A.sum(), logits=A, hidden_states=(B, B), attentions=(B,)), ["logits"]),
        ({"loss": A, "hidden_states": B}, ["loss", "hidden_states"]),
    ],
)
def test_tensors_are_named_by_keys_fields_and_places(output: object, names: list[str]) -> None:
    assert list(named_tensors(output)) == names


def test_what_holds_no_tensor_is_refused() -> None:
    for output, kind in ((None, "NoneType"), ({"a": 1}, "dict"), ("text", "str"), ([], "list")):
        with pytest.raises(NetworkError, match=f"returns a {kind}, which holds no tensor. Return a tensor, or"):
            named_tensors(output)


def test_an_answer_is_the_tasks_tensor_or_all_of_them() -> None:
    several = {"features": B, "logits": A}
    assert answer_of(several, "classification") is A
    assert answer_of((A, B), "classification") is A
    assert answer_of(A, "embedding") is A
    assert answer_of(several, "tree") == several
    assert list(answer_of(A, "tree")) == ["output"]


def _mean(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :5]


@pytest.mark.parametrize(
    ("function", "spec", "attributes", "task"),
    [
        (_mean, IMAGES, {}, None),
        (lambda images: images.flatten(1)[:, :1], IMAGES, {}, "tree"),
        (lambda images: images.mean((1, 2, 3)), IMAGES, {}, "tree"),
        (lambda images: (_mean(images), images), IMAGES, {}, "tree"),
        (lambda images: {"logits": _mean(images), "boxes": _mean(images)}, IMAGES, {}, "tree"),
        (lambda images: images, IMAGES, {}, "dense"),
        (lambda images: images[:, :1], IMAGES, {}, "tree"),
        (lambda ids: ids[:, :, None].expand(-1, -1, 7), TEXTS, {}, "tokens"),
        (lambda ids: ids[:, :3, None].expand(-1, -1, 7), TEXTS, {}, "tree"),
        (_mean, TEXTS, {}, None),
        (_mean, IMAGES, {"num_classes": 0}, "embedding"),
        (_mean, IMAGES, {"task": "embedding"}, "embedding"),
        (_mean, IMAGES, {"task": "detect"}, None),
        (lambda images: {"sentence_embedding": _mean(images)}, TEXTS, {}, "embedding"),
    ],
)
def test_the_structure_the_shape_and_the_input_decide(
    function: Any, spec: AnyInput, attributes: dict[str, Any], task: str | None
) -> None:
    assert load(Returns(function, spec, **attributes)).spec.task == task


def _bert(kind: Any, **settings: Any) -> Network:
    config = BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=6,
        **settings,
    )
    torch.manual_seed(0)
    return load(kind(config))


@pytest.mark.parametrize(
    ("kind", "settings", "task"),
    [
        (BertModel, {}, "embedding"),
        (BertForSequenceClassification, {"num_labels": 3}, None),
        (BertForSequenceClassification, {"num_labels": 3, "problem_type": "regression"}, "tree"),
        (BertForTokenClassification, {"num_labels": 3}, "tokens"),
    ],
)
def test_the_networks_of_transformers_have_their_task(kind: Any, settings: dict[str, Any], task: str | None) -> None:
    network = _bert(kind, **settings)
    assert network.spec.task == task
    assert network.class_count() == (0 if task in ("embedding", "tree") else 3)


def test_a_task_that_the_output_is_not_is_refused() -> None:
    module = Returns(_mean)
    assert load(module, task="embedding").spec.task == "embedding"
    assert load(module, task="classification").spec.task is None
    with pytest.raises(
        NetworkError,
        match=r"its output is a tensor of shape \(N, 5\), and --task dense needs logits of at least two classes for "
        r"each pixel \(N, classes, H, W\)\. Leave --task out, or give one that fits: classification, embedding, tree\.",
    ):
        load(module, task="dense")


def test_an_output_without_a_batch_is_refused() -> None:
    with pytest.raises(NetworkError, match=r"its output 'output1' has the shape \(3,\) for 2 samples"):
        load(Returns(lambda images: (images, images.new_zeros(3))))


def test_weights_keep_the_task_of_their_spec(tmp_path: Path) -> None:
    made = load(built(), task="embedding")
    spec = made.spec.with_(name=f"{built.__module__}:{built.__qualname__}")
    write_checkpoint(tmp_path / "t.safetensors", made.module.state_dict(), spec)
    assert load(tmp_path / "t.safetensors", network=built).spec.task == "embedding"
    assert load(tmp_path / "t.safetensors", network=built, task="classification").spec.task is None


def built() -> nn.Module:
    return Returns(_mean)
