from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from litdeploy.errors import NetworkError
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.precision import quantise_onnx
from litdeploy.networks import Network
from litdeploy.runtime import open_runner


@pytest.fixture(scope="module")
def quantised(student: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    export_onnx(student, folder / "fp32.onnx", None)
    details = quantise_onnx(folder / "fp32.onnx", folder / "int8.onnx", student.example(96))
    assert details["quantised"] == {"Conv": 7, "Add": 3, "Gemm": 1}
    return folder / "int8.onnx"


def test_every_loader_finds_what_it_needs(quantised: Path) -> None:
    graph = onnx.load_model(quantised).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    quantise = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    dequantise = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    # TensorRT: symmetric, in int8, no bias in int32, and a constant is dequantised where it is stored.
    for node in (*quantise, *dequantise):
        zero_point = onnx.numpy_helper.to_array(constants[node.input[2]])
        assert zero_point.dtype.name == "int8"
        assert not zero_point.any()
    assert not [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT32]
    stored = {name for name, tensor in constants.items() if tensor.data_type == TensorProto.INT8}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            assert not stored.intersection(node.input), node.name
    scales = {node.input[0]: constants[node.input[1]].dims for node in dequantise}
    weights = {name: scale for name, scale in scales.items() if name in constants}
    assert len(weights) == 8
    # One scale a channel.
    assert all(list(scale) == [constants[name].dims[0]] for name, scale in weights.items())


def test_it_says_what_it_is(quantised: Path, student: Network) -> None:
    properties = {each.key: each.value for each in onnx.load_model(quantised).metadata_props}
    assert properties["precision"] == "int8"
    assert json.loads(properties["classes"]) == list("0123456789")
    with open_runner("onnxruntime", path=quantised, device=torch.device("cpu")) as runner:
        assert runner.describe().precision == "int8"
        found = runner.run(student.example(96))
    with torch.no_grad():
        expected = student.module(student.example(96))
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


class Averages(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :10].relu()


def test_where_nothing_can_be_quantised_it_says_so(student: Network, tmp_path: Path) -> None:
    module = Averages()
    module.unused = nn.Parameter(torch.zeros(1))
    export_onnx(Network(module, student.spec, "mine"), tmp_path / "fp32.onnx", None)
    with pytest.raises(NetworkError, match="nothing in the network can be quantised"):
        quantise_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", student.example(4))
