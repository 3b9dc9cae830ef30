from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from litdeploy.errors import GateError
from litdeploy.exporter.precision import check_precision_share, engine_precisions, onnx_weights
from litdeploy.runtime.engine import Precisions

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
