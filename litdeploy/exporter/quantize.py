"""int8 by static quantisation: an ONNX file with QuantizeLinear and DequantizeLinear, for onnxruntime and TensorRT."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litdeploy.batch import Batch, in_parts
from litdeploy.errors import NetworkError
from litdeploy.runtime.adapter import read_adapter

_MULTIPLICATIONS = ("Conv", "Gemm", "MatMul")
# What costs time, and the additions between, so that int8 is not left and entered again at each shortcut.
_QUANTISED = (*_MULTIPLICATIONS, "Add")
_BATCH_SIZE = 64


def quantise_onnx(source: Path, path: Path, inputs: Batch) -> dict[str, Any]:
    """Writes a float32 ONNX file of `export_onnx` in int8.

    Weights are symmetric, one scale a channel; activations symmetric, one scale a tensor, from the least and largest
    value on the calibration images. Symmetric, since TensorRT takes no zero point; for the same reason biases stay
    float32, and a weight is stored in int8 right before its DequantizeLinear.

    Args:
        source: the float32 file.
        path: of the file to write.
        inputs: what to calibrate on, as the network takes it (normalised float32 images), on the CPU.

    Returns:
        `quantised`: how many nodes of each type take int8; `bytes`.

    Raises:
        NetworkError: nothing in it can be quantised.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = onnx.load_model(source)
    properties = {each.key: each.value for each in model.metadata_props}
    adapter = read_adapter(properties)
    batches = [_arrays(adapter.adapt(part), model.graph.input[0].name) for part in in_parts(inputs, _BATCH_SIZE)]
    with _quiet():
        quantize_static(
            source,
            path,
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTISED),
            nodes_to_exclude=_other_additions(model.graph),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                # What goes in is quantised, and not what comes out: else each convolution is rounded before its ReLU
                # and after it. ResNet-20 on 2,048 images of CIFAR-10: logits 0.18 from fp32 (root mean square) and not
                # 0.20, and no slower.
                "OpTypesToExcludeOutputQuantization": list(_QUANTISED),
            },
        )
    quantised = onnx.load_model(path)
    onnx.helper.set_model_props(quantised, {**properties, "precision": "int8"})
    onnx.checker.check_model(quantised, full_check=True)
    onnx.save_model(quantised, path)
    counts = _quantised(quantised.graph)
    if not counts:
        raise NetworkError(
            f"nothing in the network can be quantised: it has no {', '.join(_QUANTISED)} with fixed weights. Export it "
            "in another precision: --precision fp16"
        )
    return {"quantised": counts, "bytes": path.stat().st_size}


class _Reader:
    """Calibration batches, as onnxruntime asks for them."""

    def __init__(self, batches: Sequence[dict[str, Any]]) -> None:
        self._batches = batches
        self._left: Iterator[dict[str, Any]] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)

    def rewind(self) -> None:
        self._left = iter(self._batches)


def _arrays(batch: Batch, name: str) -> dict[str, Any]:
    """What onnxruntime takes, by the names of a file's inputs; `name` is that of a single one."""
    tensors = batch if isinstance(batch, dict) else {name: batch}
    return {key: tensor.numpy() for key, tensor in tensors.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences its advice on the root logger to preprocess a file, which export_onnx has done; and, before onnxruntime
    1.31, numpy's words on scales that it computes for all that is added, and uses for what is quantised only."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "overflow encountered in subtract", RuntimeWarning)
            yield
    finally:
        logging.root.setLevel(level)


def _other_additions(graph: Any) -> list[str]:
    """Additions of what no multiplication made: a bias, whose few values int8 would only make coarser, or an attention
    mask, whose least value is float32's own, so that all that is added to it would be rounded away."""
    multiplied: set[str] = set()
    for node in graph.node:  # ONNX keeps them in an order in which they can run
        if node.op_type in _MULTIPLICATIONS or multiplied.intersection(node.input):
            multiplied.update(node.output)
    return [node.name for node in graph.node if node.op_type == "Add" and not multiplied.issuperset(node.input)]


def _quantised(graph: Any) -> dict[str, int]:
    """Node type → how many of them take an input from a DequantizeLinear."""
    dequantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return dict(
        Counter(
            node.op_type for node in graph.node if node.op_type in _QUANTISED and dequantised.intersection(node.input)
        )
    )
