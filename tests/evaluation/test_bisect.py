from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from litdeploy.config.target import Precision, Target
from litdeploy.evaluation.bisect import first_parting
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.precision import convert, quantize_onnx
from litdeploy.networks import Network

TOLERANCE = Target().tolerance


Written = Callable[[Precision], Path]


@pytest.fixture(scope="module")
def written(student: Network, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The student's ONNX file in a precision, made once. Nothing is written into it."""
    folder = tmp_path_factory.mktemp("written")
    batches = [student.example(64)]

    @cache
    def write(precision: Precision) -> Path:
        path = folder / f"{precision}.onnx"
        if precision == "int8":
            quantize_onnx(write("fp32"), path, batches[0])
        else:
            conversion = None if precision == "fp32" else convert(student, precision, batches)
            export_onnx(student, path, None, conversion=conversion)
        return path

    return write


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_in_every_precision_the_layers_are_found_and_agree(
    student: Network, written: Written, precision: Precision
) -> None:
    path = written(precision)
    assert first_parting(student, path, student.example(4), getattr(TOLERANCE, precision)) is None
    # A limit that nothing keeps, but a convolution that both happen to compute alike.
    nothing = TOLERANCE.fp32.model_copy(update={"atol": 0.0, "rtol": 0.0})
    parting = first_parting(student, path, student.example(4), nothing)
    assert parting is not None
    assert parting.layer in ("conv1", "layer1.0.conv1")


@pytest.mark.parametrize(
    ("precision", "layer"), [("fp32", "layer1.0.conv2"), ("bf16", "layer3.0.conv1"), ("fp32", "linear")]
)
def test_the_layer_with_the_wrong_weight_is_named(
    student: Network, written: Written, tmp_path: Path, precision: Precision, layer: str
) -> None:
    model, path = onnx.load_model(written(precision)), tmp_path / "wrong.onnx"
    node = next(node for node in model.graph.node if node.name.startswith(f"{layer}/"))
    weight = next(each for each in model.graph.initializer if each.name == node.input[1])
    values = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(values * values.dtype.type(-3), weight.name))
    onnx.save_model(model, path)
    parting = first_parting(student, path, student.example(4), getattr(TOLERANCE, precision))
    assert parting is not None
    assert parting.layer == layer
