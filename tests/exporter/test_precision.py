from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from litdeploy.config.spec import InputSpec, NetworkSpec
from litdeploy.config.target import Precision
from litdeploy.errors import GateError, NetworkError
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.precision import (
    SAFE_SHARE,
    check_precision_share,
    convert,
    engine_precisions,
    onnx_weights,
    quantize_onnx,
)
from litdeploy.networks import Network
from litdeploy.runtime import open_runner
from litdeploy.runtime.engine import Precisions

CPU = torch.device("cpu")
LARGE = 2.0**18


class Overflows(nn.Module):
    """Its middle is beyond fp16: in a layer, and in a sum that is written in `forward`."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.large = nn.Conv2d(8, 8, 1)
        self.small = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        kept = self.first(images)
        large = self.large(kept) * self.factor
        normal = self.small((large + kept) / self.factor)
        logits: Tensor = self.last(normal.mean((2, 3)))
        return logits


def made(student: Network, module: nn.Module) -> Network:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return Network(module.eval(), student.spec, "mine")


def logits(network: Network, path: Path, precision: Precision, batches: list[Tensor]) -> Tensor:
    export_onnx(network, path, None, conversion=convert(network, precision, batches))
    with open_runner("onnxruntime", path=path, device=CPU) as runner:
        return runner.run(batches[0])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_network_that_fits_is_converted_whole(student: Network, precision: Precision) -> None:
    batches = [student.example(8), 3 * student.example(8)]
    found = convert(student, precision, batches)
    assert found.kept == ("linear",)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    for name, parameter in found.module.named_parameters():
        assert parameter.dtype == (torch.float32 if ".linear." in name else dtype), name
    assert {parameter.dtype for parameter in student.module.parameters()} == {torch.float32}
    largest = []
    handles = [
        module.register_forward_hook(lambda *given: largest.append(given[2].abs().max().item()))
        for module in student.module.modules()
    ]
    with torch.no_grad():
        for batch in batches:
            student.module(batch)
    for handle in handles:
        handle.remove()
    # Outputs of the convolutions are not there once the batch norms are folded.
    assert 0 < found.largest <= max(largest)
    assert found.largest_layer in dict(student.module.named_modules())


def test_what_overflows_stays_in_fp32_and_the_logits_are_right(student: Network, tmp_path: Path) -> None:
    network = made(student, Overflows(LARGE))
    batches = [student.example(8)]
    found = convert(network, "fp16", batches)
    assert found.largest > torch.finfo(torch.float16).max
    assert found.kept == ("", "last")
    with torch.no_grad():
        expected = network.module(batches[0])
    result = logits(network, tmp_path / "network.onnx", "fp16", batches)
    torch.testing.assert_close(result, expected, atol=0.02, rtol=0.02)
    types = {tensor.data_type for tensor in onnx.load_model(tmp_path / "network.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types


def test_a_layer_that_overflows_keeps_its_weights(student: Network) -> None:
    network = made(student, Overflows(1.0))
    module = network.module
    assert isinstance(module, Overflows)
    with torch.no_grad():
        module.large.weight.mul_(LARGE)
    found = convert(network, "fp16", [student.example(8)])
    assert found.kept[0] == "large"
    types = {name: parameter.dtype for name, parameter in found.module.named_parameters()}
    assert types["module.large.weight"] == torch.float32
    assert types["module.first.weight"] == torch.float16
    assert convert(network, "bf16", [student.example(8)]).kept == ("last",)


@pytest.mark.parametrize(("share", "kept"), [(0.9, ("last",)), (1.1, ("small", "", "last"))])
def test_the_share_leaves_room_for_other_images(student: Network, share: float, kept: tuple[str, ...]) -> None:
    network = made(student, Overflows(1.0))
    module = network.module
    assert isinstance(module, Overflows)
    batch = student.example(8)
    with torch.no_grad():
        module.small.bias.zero_()
        largest = module.small(module.large(module.first(batch)) + module.first(batch)).abs().max()
        module.small.weight.mul_(share * SAFE_SHARE * torch.finfo(torch.float16).max / largest)
    assert convert(network, "fp16", [batch]).kept == kept


class ChangesItsMind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 10), nn.Linear(64, 10)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        flat = images.flatten(1)
        logits: Tensor = self.first(flat) if self.calls < 3 else self.second(flat).relu()
        return logits


def test_a_forward_that_changes_is_refused(student: Network) -> None:
    network = Network(ChangesItsMind().eval(), student.spec, "mine.py")
    converted = convert(network, "fp16", [student.example(2)])
    with pytest.raises(NetworkError, match=r"mine.py: its forward does not make the same calls"):
        converted.module(student.example(2))


def test_what_onnx_lacks_in_bfloat16_stays_in_fp32() -> None:
    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(8, 8), nn.Linear(2, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(images.flatten(1)).topk(2).values)

    spec = NetworkSpec(name="any", input=InputSpec(shape=(1, 2, 4), mean=(0.5,), std=(0.5,)))
    network = Network(Largest(), spec, "any")
    kept = {precision: convert(network, precision, [network.example(4)]).kept for precision in ("fp16", "bf16")}
    assert kept == {"fp16": ("head",), "bf16": ("", "head")}


@pytest.fixture(scope="module")
def quantised(student: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    export_onnx(student, folder / "fp32.onnx", None)
    details = quantize_onnx(folder / "fp32.onnx", folder / "int8.onnx", student.example(96))
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
    with pytest.raises(NetworkError, match="nothing in the network can be quantized"):
        quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", student.example(4))


DEMANDED = Precisions(source="network", layers={"fp16": 1.0}, weights={"fp16": 1.0})


def information(*layers: Any) -> str:
    return json.dumps({"Layers": list(layers)})


def convolution(kind: str, count: int, output: dict[str, str]) -> dict[str, Any]:
    return {
        "Name": "conv",
        "LayerType": "CaskConvolution",
        "Outputs": [{"Name": "out", "Dimensions": [8, 4, 8, 8], **output}],
        "Weights": {"Type": kind, "Count": count},
        "Bias": {"Type": "Float", "Count": 4},
    }


def test_weights_of_a_file_are_counted_by_type_without_scales(tmp_path: Path) -> None:
    weights = [
        numpy_helper.from_array(np.ones((10, 64), dtype=np.int8), "weights"),
        numpy_helper.from_array(np.ones(10, dtype=np.float32), "scales"),
        numpy_helper.from_array(np.zeros(10, dtype=np.int8), "zeros"),
        numpy_helper.from_array(np.ones(64, dtype=np.float16), "bias"),
        numpy_helper.from_array(np.array([1, 64], dtype=np.int64), "shape"),
    ]
    node = helper.make_node("DequantizeLinear", ["weights", "scales", "zeros"], ["out"], axis=0)
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [10, 64])
    onnx.save_model(helper.make_model(helper.make_graph([node], "g", [], [output], weights)), tmp_path / "some.onnx")
    assert onnx_weights(tmp_path / "some.onnx") == {"int8": 640, "fp16": 64}


# The names of the fields and of the types, before and from TensorRT 11.
@pytest.mark.parametrize(
    "output",
    [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}, {"DataType": "Half", "Format": "kHWC8"}],
)
def test_the_inspector_tells_the_types_of_layers_and_weights(output: dict[str, str]) -> None:
    layers = (
        convolution("Half", 996, output),
        {"Name": "relu", "LayerType": "PointWise", "Outputs": [output]},
        {"Name": "copy", "LayerType": "Reformat", "Outputs": [{"DataType": "Float"}]},
        {"Name": "mean", "LayerType": "Reduce", "Outputs": [{"Format/Datatype": "Row major linear FP32"}]},
    )
    found = engine_precisions(information(*layers), DEMANDED)
    assert found.source == "engine"
    assert found.layers == {"fp16": 0.6667, "fp32": 0.3333}
    assert found.weights == {"fp16": 0.996, "fp32": 0.004}


def test_a_quantised_convolution_is_of_the_type_of_its_weights() -> None:
    found = engine_precisions(information(convolution("Int8", 996, {"DataType": "Half"})), DEMANDED)
    assert found.layers == {"int8": 1.0}
    assert found.weights == {"int8": 0.996, "fp32": 0.004}


@pytest.mark.parametrize("kind", ["BF16", "BFloat16"])
def test_bfloat16_is_not_taken_for_another_float(kind: str) -> None:
    found = engine_precisions(information({"LayerType": "kgen", "Outputs": [{"DataType": kind}]}), DEMANDED)
    assert found.layers == {"bf16": 1.0}
    assert found.weights == DEMANDED.weights  # of a fused layer the inspector does not tell them


@pytest.mark.parametrize(
    "layer", ["conv1 + relu1", {"LayerType": "kgen", "Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}]
)
def test_where_the_inspector_tells_no_types_the_network_does(layer: Any) -> None:
    assert engine_precisions(information(layer), DEMANDED) is DEMANDED


def shares(layers: dict[str, float], weights: dict[str, float]) -> Precisions:
    return Precisions(source="network", layers=layers, weights=weights)


def test_mostly_in_the_precision_is_enough() -> None:
    path = Path("student.onnx")
    check_precision_share("fp16", shares({"fp16": 0.9, "fp32": 0.1}, {"fp16": 1.0}), path)
    check_precision_share("int8", shares({"int8": 0.4, "fp32": 0.6}, {"int8": 0.99, "fp32": 0.01}), path)
    check_precision_share("fp32", shares({"fp32": 1.0}, {}), path)


@pytest.mark.parametrize(
    ("precision", "layers", "weights", "message"),
    [
        ("fp16", {"fp32": 0.6, "fp16": 0.4}, {"fp16": 1.0}, "only 40% of the layers"),
        ("fp16", {"fp16": 1.0}, {"fp32": 0.5, "fp16": 0.5}, "only 50% of the weights"),
        ("int8", {"fp32": 1.0}, {"fp32": 1.0}, "only 0% of the weights"),
    ],
)
def test_mostly_in_another_precision_fails(
    precision: str, layers: dict[str, float], weights: dict[str, float], message: str
) -> None:
    with pytest.raises(GateError, match=message) as caught:
        check_precision_share(precision, shares(layers, weights), Path("student.onnx"))
    assert "layers:" in str(caught.value)
    assert f"--precision {precision}" in str(caught.value)
