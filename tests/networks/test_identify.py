from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from litdeploy.errors import NetworkError
from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.families.resnext import resnext
from litdeploy.networks.identify import describe, identify
from litdeploy.networks.registry import _argument, request

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
    with pytest.raises(NetworkError, match="not a network that litdeploy recognises") as caught:
        identify(weights, "teacher.pt")
    assert hint in str(caught.value)


def test_a_family_that_was_asked_for_and_does_not_fit() -> None:
    with pytest.raises(NetworkError, match="recognises"):
        identify(resnet(20).state_dict(), "teacher.pt", request("resnext29"))


def test_a_network_is_described_as_it_is_asked_for() -> None:
    for text in ("resnet,depth=20,shortcut=B", "timm,pretrained=true,rate=0.5"):
        name, *pairs = text.split(",")
        arguments = dict(_argument(pair, text) for pair in pairs)
        assert describe(name, arguments) == text
