from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BartConfig, BertConfig, RobertaConfig, ViTConfig

from litdeploy.config.spec import TokenInput
from litdeploy.errors import DependencyError, NetworkError
from litdeploy.networks import load
from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.families.resnext import resnext
from litdeploy.networks.registry import Request, _argument, check_stored, describe, identify, request


def test_names_and_arguments() -> None:
    assert request("resnet56").arguments == {"depth": 56}
    assert request("resnet,depth=20,shortcut=B").arguments == {"depth": 20, "shortcut": "B"}
    assert request("resnet20,classes=3").build()(torch.randn(1, 3, 8, 8)).shape == (1, 3)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, again, other = (request("resnet8").build(seed=seed).state_dict()["conv1.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg16", "no network 'vgg16'"),
        ("resnet21", "6n\\+2"),
        ("resnet,depth", "write key=value"),
        ("resnet,deepth=8", "deepth"),
        ("no.such.module:build", "no module 'no'"),
        ("json:no_such_function", "has no function"),
        ("json:dumps,obj=1", "returns a str"),
    ],
)
def test_what_is_no_network_is_refused(name: str, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        request(name).build()


@pytest.mark.parametrize(("name", "library"), [("timm:resnet50", "timm"), ("hf:some/model", "transformers")])
def test_an_absent_library_says_what_to_install(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DependencyError, match=f"pip install {library}"):
        request(name)


def test_a_transformers_configuration_in_a_folder(tmp_path: Path) -> None:
    ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    ).save_pretrained(tmp_path)
    asked = request(f"hf:{tmp_path},num_labels=5")
    module = asked.build()
    assert module(torch.randn(1, 3, 32, 32)).logits.shape == (1, 5)
    declared = asked.input(module, {})
    assert declared is not None
    assert declared.shape == (3, 32, 32)


def test_a_text_classifier_of_transformers_in_a_folder(tmp_path: Path) -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    BertConfig(vocab_size=50, max_position_embeddings=32, **small).save_pretrained(tmp_path)
    asked = request(f"hf:{tmp_path},num_labels=5")
    module = asked.build()
    assert module(torch.tensor([[1, 2, 3]])).logits.shape == (1, 5)
    assert asked.input(module, {}) == TokenInput(length=32, vocabulary=50)
    # Its first two positions are the padding's.
    RobertaConfig(vocab_size=50, max_position_embeddings=34, **small).save_pretrained(tmp_path)
    asked = request(f"hf:{tmp_path}")
    assert asked.input(asked.build(), {}) == TokenInput(length=32, vocabulary=50, pad=1)


def test_a_configuration_of_a_network_that_is_not_taken(tmp_path: Path) -> None:
    BartConfig(architectures=["BartForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(NetworkError, match=r"BartForConditionalGeneration \(an encoder with a decoder\), which"):
        request(f"hf:{tmp_path}").build()


def test_a_module_says_itself_what_it_takes() -> None:
    module = nn.Embedding(10, 3)
    module.input_spec = TokenInput(length=8, vocabulary=10)
    assert request(module).input(module, {}) == TokenInput(length=8, vocabulary=10)


def test_a_transformers_name_that_is_not_there() -> None:
    with pytest.raises(NetworkError, match=r"config\.json"):
        request("hf:nobody/nothing").build()


def test_a_users_own_function_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_net.py").write_text(
        "from torch import nn\ndef build(width=4):\n    return nn.Sequential(nn.Linear(width, width))\n"
    )
    monkeypatch.chdir(tmp_path)
    module = request("my_own_net:build,width=6").build({"width": 6})
    assert module[0].in_features == 6  # type: ignore[index]
    assert str(tmp_path) not in sys.path


def test_a_module_and_a_function_of_the_callers() -> None:
    module = nn.Linear(3, 3)
    copied = request(module).build()
    assert copied is not module
    assert torch.equal(copied.weight, module.weight)  # type: ignore[arg-type]
    assert not request(module).initialises
    assert request(lambda: nn.Linear(2, 2)).build().in_features == 2


CANARY = "from pathlib import Path\nPath('evil-was-here').touch()\ndef build(**arguments): ...\n"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evil_module:build", {}, "run only if you name it: --network evil_module:build"),
        ("os:system", {"command": "touch evil-was-here"}, "run only if you name it"),
        ("timm:hf-hub:some/model", {}, "timm reads from elsewhere"),
        ("timm:local-dir:/tmp", {}, "timm reads from elsewhere"),
        ("timm:resnet18", {"checkpoint_path": "evil.pth"}, "checkpoint_path='evil.pth'"),
        ("timm:resnet18", {"norm_layer": "../../evil"}, "norm_layer"),
        ("hf:some/model", {"trust_remote_code": True}, "trust_remote_code=True"),
        ("hf:some/model", {"attn_implementation": "evil/kernel"}, "attn_implementation"),
        ("resnet,depth=8", {}, "not a name"),
    ],
)
def test_a_file_names_no_code_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text(CANARY)
    spec = {"name": name, "arguments": arguments, "input": {"shape": [1, 8, 8], "mean": [0.5], "std": [0.5]}}
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"litdeploy": json.dumps(spec)})
    with pytest.raises(NetworkError, match=message):
        load(tmp_path / "a.safetensors")
    assert not (tmp_path / "evil-was-here").exists()


def test_what_the_user_named_may_have_such_arguments() -> None:
    asked = request("timm:resnet18,checkpoint_path=/mine.pth") if importlib.util.find_spec("timm") else None
    if asked is None:
        asked = Request("timm:resnet18", {"checkpoint_path": "/mine.pth"}, nn.Identity)
    check_stored("timm:resnet18", {"checkpoint_path": "/mine.pth"}, asked, "a.pt")
    with pytest.raises(NetworkError, match="other"):
        check_stored("timm:resnet18", {"checkpoint_path": "/other.pth"}, asked, "a.pt")


def test_a_configuration_that_asks_for_kernels_from_elsewhere_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = {"model_type": "vit", "image_size": 8, "patch_size": 4, **sizes, "_attn_implementation": "evil/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NetworkError, match="evil/kernel"):
        request(f"hf:{tmp_path}").build()


RESNETS: list[dict[str, Any]] = [
    {"depth": 20, "classes": 10, "shortcut": "A", "width": 16, "in_channels": 3},
    {"depth": 8, "classes": 100, "shortcut": "B", "width": 4, "in_channels": 1},
    {"depth": 56, "classes": 7, "shortcut": "A", "width": 16, "in_channels": 3},
]
RESNEXT = {
    "depth": 20,
    "classes": 10,
    "cardinality": 4,
    "width": 2,
    "out_width": 32,
    "stem_width": 8,
    "in_channels": 3,
}


@pytest.mark.parametrize("arguments", RESNETS)
def test_a_resnet_is_recognised_with_all_its_arguments(arguments: dict[str, Any]) -> None:
    name, reading = identify(resnet(**arguments).state_dict(), "here")
    assert (name, reading.arguments) == ("resnet", arguments)


def test_a_resnext_is_recognised_with_all_its_arguments() -> None:
    name, reading = identify(resnext(**RESNEXT).state_dict(), "here")
    assert (name, reading.arguments) == ("resnext", RESNEXT)


def _renamed(weights: dict[str, Tensor], rules: dict[str, str]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in weights.items():
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def test_other_peoples_names_of_a_resnet() -> None:
    network = resnet(14, shortcut="B")
    theirs = _renamed(network.state_dict(), {r"shortcut": "downsample", "^linear": "fc"})
    name, reading = identify(theirs, "here")
    assert (name, reading.arguments["shortcut"]) == ("resnet", "B")
    resnet(14, shortcut="B").load_state_dict(reading.weights)


def test_other_peoples_names_of_a_resnext() -> None:
    """The names of the reimplementation of the paper's Torch code that most CIFAR checkpoints come from."""
    theirs = _renamed(
        resnext(**RESNEXT).state_dict(),
        {
            r"^conv1\.": "conv_1_3x3.",
            r"^bn1\.": "bn_1.",
            r"^layer(\d)\.(\d+)\.": r"stage_\1.stage_\1_bottleneck_\2.",
            r"\.conv1\.": ".conv_reduce.",
            r"\.bn1\.": ".bn_reduce.",
            r"\.conv2\.": ".conv_conv.",
            r"\.bn2\.": ".bn.",
            r"\.conv3\.": ".conv_expand.",
            r"\.bn3\.": ".bn_expand.",
            r"shortcut\.0\.": "shortcut.shortcut_conv.",
            r"shortcut\.1\.": "shortcut.shortcut_bn.",
            r"^linear\.": "classifier.",
        },
    )
    name, reading = identify(theirs, "here")
    assert (name, reading.arguments) == ("resnext", RESNEXT)
    resnext(**RESNEXT).load_state_dict(reading.weights)


def test_two_readings_are_told_and_network_decides() -> None:
    theirs = _renamed(resnet(20).state_dict(), {"^linear": "fc"})
    with pytest.raises(NetworkError) as caught:
        identify(theirs, "teacher.pt")
    message = str(caught.value)
    assert "fit 2 networks" in message
    assert "--network resnet,depth=20,classes=10,width=16,in_channels=3,shortcut=A " in message
    assert "shortcut=A-end" in message
    for shortcut in ("A", "A-end"):
        _, reading = identify(theirs, "teacher.pt", request(f"resnet,shortcut={shortcut}"))
        assert reading.arguments["shortcut"] == shortcut


@pytest.mark.parametrize(
    ("weights", "hint"),
    [
        ({"a.weight": torch.zeros(1)}, "timm:NAME"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7), "layer4.1.conv1.weight": torch.zeros(1)}, "timm:resnet50"),
        ({name: value for name, value in resnet(20).state_dict().items() if "layer2.1" not in name}, "--network"),
    ],
)
def test_what_is_not_recognised_says_what_to_type(weights: dict[str, Tensor], hint: str) -> None:
    with pytest.raises(NetworkError, match="not a network that litdeploy recognizes") as caught:
        identify(weights, "teacher.pt")
    assert hint in str(caught.value)


def test_a_family_that_was_asked_for_and_does_not_fit() -> None:
    with pytest.raises(NetworkError, match="recognizes"):
        identify(resnet(20).state_dict(), "teacher.pt", request("resnext29"))


def test_a_network_is_described_as_it_is_asked_for() -> None:
    for text in ("resnet,depth=20,shortcut=B", "timm,pretrained=true,rate=0.5"):
        name, *pairs = text.split(",")
        arguments = dict(_argument(pair, text) for pair in pairs)
        assert describe(name, arguments) == text
