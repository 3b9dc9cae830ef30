from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from litdeploy.errors import CheckpointError, NetworkError
from litdeploy.inspection import inspect
from litdeploy.networks import load
from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.limit import BuildLimit

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
    with pytest.raises(NetworkError, match="not a network that litdeploy recognises"):
        load(tmp_path / "a.safetensors")


def test_what_is_made_is_counted() -> None:
    with BuildLimit({"a": torch.zeros(10)}, "a.pt"):
        torch.zeros(1000)
        with pytest.raises(NetworkError, match=r"a\.pt"):
            torch.empty(2**27 + 1000)
