from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from litdeploy.config.spec import InputSpec, NetworkSpec, TensorInput, TokenInput
from litdeploy.errors import CheckpointError, NetworkError, SettingsError
from litdeploy.inspection import inspect
from litdeploy.networks import find_sections, load, new
from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.load import BuildLimit
from litdeploy.networks.student import shorten
from litdeploy.storage.checkpoint import write_checkpoint

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 3)
    )


def test_a_bare_checkpoint_is_recognised(tmp_path: Path) -> None:
    network = resnet(14, shortcut="B").eval()
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    found = load(tmp_path / "teacher.pt", normalise="cifar10", input_shape=(3, 16, 16))
    assert torch.equal(found.module(EXAMPLE), network(EXAMPLE))
    assert not found.module.training
    assert found.spec.input.shape == (3, 16, 16)
    assert found.spec.input.mean == (0.4914, 0.4822, 0.4465)
    assert found.class_count() == 10


def test_a_student_is_rebuilt_from_its_header(tmp_path: Path) -> None:
    student = resnet(20).eval()
    plan = {"layer1": (0, 2), "layer3": (0,)}
    shorten(student, plan)
    spec = NetworkSpec(
        name="resnet",
        arguments={"depth": 20},
        input=InputSpec(shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3),
        plan=plan,
    )
    write_checkpoint(tmp_path / "s.safetensors", student.state_dict(), spec)
    found = load(tmp_path / "s.safetensors")
    assert torch.equal(found.module(EXAMPLE), student(EXAMPLE))
    assert found.spec == spec
    with pytest.raises(NetworkError, match="Leave --network out"):
        load(tmp_path / "s.safetensors", network="resnet56")


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "s.safetensors", {"litdeploy": '{"name": 3}'})
    with pytest.raises(CheckpointError, match="header's description of the network is damaged"):
        load(tmp_path / "s.safetensors")


def test_a_users_network_runs_only_when_it_is_named(tmp_path: Path) -> None:
    name = f"{__name__}:mlp"
    shape = (1, 8, 8)
    spec = NetworkSpec(name=name, input=InputSpec(shape=shape, mean=(0.5,), std=(0.5,)))
    write_checkpoint(tmp_path / "t.safetensors", mlp().state_dict(), spec)
    with pytest.raises(NetworkError, match=f"--network {name}"):
        load(tmp_path / "t.safetensors")
    for network in (name, mlp):
        assert load(tmp_path / "t.safetensors", network=network).class_count() == 3


def test_an_input_that_nothing_tells_must_be_given(tmp_path: Path) -> None:
    torch.save(mlp().state_dict(), tmp_path / "t.pt")
    with pytest.raises(NetworkError, match="nothing says what the network"):
        load(tmp_path / "t.pt", network=mlp)
    found = load(tmp_path / "t.pt", network=mlp, input_shape=(1, 8, 8), normalise="half")
    assert found.spec.input.shape == (1, 8, 8)


@pytest.mark.parametrize(("convolution", "shape"), [(nn.Conv1d(1, 4, 3), (1, 16)), (nn.Conv3d(1, 4, 3), (1, 4, 5, 6))])
def test_a_shape_of_another_rank_is_of_a_tensor_as_it_is(convolution: nn.Module, shape: tuple[int, ...]) -> None:
    module = nn.Sequential(convolution, nn.Flatten(), nn.LazyLinear(3))
    module(torch.zeros(1, *shape))
    found = load(module, input_shape=shape)
    assert found.spec.input == TensorInput.of(shape, "input")
    assert found.class_count() == 3
    with pytest.raises(SettingsError, match="is not of one"):
        load(module, input_shape=shape, normalise="half")


class Sized(nn.Sequential):
    def __init__(self, classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, classes))


@pytest.mark.parametrize(
    "made",
    [Sized(3), partial(Sized, 3), partial(Sized, classes=3), lambda: Sized(3)],
    ids=["instance", "partial", "keywords", "lambda"],
)
def test_any_factory_or_instance_builds_the_network_of_a_file(tmp_path: Path, made: Any) -> None:
    image = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.5,))
    first = load(made if isinstance(made, nn.Module) else made(), input=image)
    if not isinstance(made, nn.Module):
        first = new(made, input_shape=(1, 8, 8), normalise="half", classes=3, seed=0)
    path = tmp_path / "n.safetensors"
    write_checkpoint(path, first.module.state_dict(), first.spec)
    with pytest.raises(NetworkError, match="which is your code"):
        load(path)
    for network in (
        Sized(3),
        partial(Sized, 3),
        partial(Sized, classes=3),
        lambda: Sized(3),
        f"{__name__}:Sized,classes=3",
    ):
        assert load(path, network=network).class_count() == 3
    with pytest.raises(CheckpointError, match="these are not the weights"):
        load(path, network=Sized(4))
    with pytest.raises(NetworkError, match="network=3: is a int"):
        load(path, network=3)  # type: ignore[arg-type]


def test_a_module_of_the_callers_is_taken_as_it_is() -> None:
    module = mlp()
    assert load(module, input_shape=(1, 8, 8), normalise="half").module is module


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(resnet(14).state_dict(), tmp_path / "t.pt")
    with pytest.raises(CheckpointError, match="missing"):
        load(tmp_path / "t.pt", network=mlp, input_shape=(1, 8, 8), normalise="half")


def test_channels_that_contradict_the_weights_are_refused(tmp_path: Path) -> None:
    torch.save(resnet(14).state_dict(), tmp_path / "t.pt")
    with pytest.raises(SettingsError, match="takes 3 channels"):
        load(tmp_path / "t.pt", input_shape=(1, 8, 8))


def test_a_new_network_takes_the_datasets_classes_and_channels() -> None:
    made = new("resnet8", normalise="half", input_shape=(1, 8, 8), classes=7, seed=0)
    assert made.class_count() == 7
    assert made.spec.arguments == {"classes": 7, "in_channels": 1, "depth": 8}


def test_the_published_teacher_is_a_resnet_56(shared: Path) -> None:
    spec = load(shared / "teachers" / "cifar10-resnet56.th").spec
    assert (spec.name, spec.arguments["depth"], spec.arguments["shortcut"]) == ("resnet", 56, "A")
    assert spec.input.mean == (0.485, 0.456, 0.406)


def test_a_text_classifier_from_its_weights_and_its_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, num_labels=4
    )
    module = transformers.BertForSequenceClassification(config).eval()
    module.save_pretrained(tmp_path)
    found = load(tmp_path / "model.safetensors", network=f"hf:{tmp_path}", input_shape=(16,))
    assert (found.class_count(), found.spec.input) == (4, TokenInput(length=16, vocabulary=50, fixed=True))
    batch = found.example(3)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask"), ((3, 16), torch.int64)
    )
    assert batch["attention_mask"].sum(1).tolist() == [16, 14, 11]
    assert torch.equal(found.module(**batch).logits, module(**batch).logits)
    assert [section.name for section in find_sections(found.module, batch)] == ["bert.encoder.layer"]


def test_a_folder_that_transformers_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    names = {0: "bad", 1: "good", 2: "so so"}
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, id2label=names
    )
    module = transformers.BertForSequenceClassification(config).eval()
    module.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert (found.spec.name, found.source) == (f"hf:{tmp_path}", str(tmp_path / "model.safetensors"))
    assert found.spec.classes == ("bad", "good", "so so")
    # As older versions wrote it: with a table that counts, and as a pickle of tensors.
    (tmp_path / "model.safetensors").unlink()
    counted = {"bert.embeddings.position_ids": torch.arange(512)[None]}
    torch.save({**module.state_dict(), **counted}, tmp_path / "pytorch_model.bin")
    batch = found.example(2)
    assert torch.equal(load(tmp_path).module(**batch).logits, module(**batch).logits)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"weights in several files .* max_shard_size"):
        load(tmp_path)
    # Another folder is no network; names of classes that say nothing are none.
    with pytest.raises(CheckpointError, match="is a folder"):
        load(tmp_path.parent)
    assert (
        load(
            transformers.BertForSequenceClassification(
                transformers.BertConfig(
                    vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
                )
            )
        ).spec.classes
        == ()
    )


def _timm() -> None:
    """timm, where it can be imported: its torchvision must be of this torch."""
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")


def test_a_new_network_of_timm_has_the_datas_classes_and_channels() -> None:
    _timm()
    made = new("timm:resnet10t", normalise=None, classes=7, seed=0, data_shape=(1, 32, 32))
    assert made.class_count() == 7
    assert made.spec.arguments == {"num_classes": 7, "in_chans": 1}
    assert made.spec.input.shape == (1, 32, 32)
    assert made.spec.input.mean == pytest.approx((0.449,), abs=1e-3)


def test_a_network_of_timm_takes_the_size_that_it_was_made_for() -> None:
    _timm()
    with pytest.raises(NetworkError, match=r"3 × 32 × 32.*.Input height .32. doesn't match.*--input-shape"):
        new("timm:vit_tiny_patch16_224", normalise=None, classes=7, seed=0, data_shape=(3, 32, 32))
    made = new("timm:vit_tiny_patch16_224,img_size=32,patch_size=4", normalise=None, classes=7, seed=0)
    assert made.spec.input.shape == (3, 32, 32)
    assert made.class_count() == 7


_INPUT = {"shape": [1, 8, 8], "mean": [0.5], "std": [0.5]}


def described(folder: Path, **changes: Any) -> Path:
    """Weights of a small ResNet, and a header that says something else of them."""
    spec = {"name": "resnet", "arguments": {"depth": 8, "width": 4, "in_channels": 1}, "input": _INPUT, **changes}
    path = folder / "a.safetensors"
    save_file(resnet(8, width=4, in_channels=1).state_dict(), path, {"litdeploy": json.dumps(spec)})
    return path


def test_a_header_that_tells_the_truth_is_within_the_limit(tmp_path: Path) -> None:
    assert load(described(tmp_path)).spec.arguments["width"] == 4


@pytest.mark.parametrize(
    "arguments", [{"depth": 8, "width": 20_000}, {"depth": 8, "width": 10**9}, {"depth": 6 * 10**9 + 2, "width": 1}]
)
def test_a_header_far_larger_than_its_weights_is_refused_before_they_are_made(
    tmp_path: Path, arguments: dict[str, int]
) -> None:
    with pytest.raises(NetworkError, match="far larger than its weights"):
        load(described(tmp_path, arguments=arguments))


@pytest.mark.parametrize("arguments", [{"width": 10**30}, {"width": "wide"}, {"classes": True, "depth": 0.5}, {"x": 1}])
def test_arguments_that_no_network_takes_are_told(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(NetworkError, match=r"resnet|depth"):
        load(described(tmp_path, arguments=arguments))


def test_an_input_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="header's description"):
        inspect(described(tmp_path, input={**_INPUT, "shape": [1, 10**6, 10**6]}))


def test_shapes_without_values_are_no_network(tmp_path: Path) -> None:
    weights = {name: torch.zeros(0, 3) for name in resnet(8).state_dict()}
    weights["linear.weight"] = torch.zeros(10**12, 0)
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(NetworkError, match="not a network that litdeploy recognizes"):
        load(tmp_path / "a.safetensors")


def test_what_is_made_is_counted() -> None:
    with BuildLimit({"a": torch.zeros(10)}, "a.pt"):
        torch.zeros(1000)
        with pytest.raises(NetworkError, match=r"a\.pt"):
            torch.empty(2**27 + 1000)
