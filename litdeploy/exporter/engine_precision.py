"""In which types a TensorRT network is computed and stored: what was asked for, or something else?"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from litdeploy.errors import GateError
from litdeploy.runtime.engine import Precisions

# TensorRT's names of the types that networks compute in; shapes are computed in others.
_TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8", "INT4": "int4", "FP4": "fp4"}
_ONNX_TYPES = {
    "FLOAT": "fp32",
    "FLOAT16": "fp16",
    "BFLOAT16": "bf16",
    "INT8": "int8",
    "UINT8": "int8",
    "FLOAT8E4M3FN": "fp8",
    "INT4": "int4",
    "FLOAT4E2M1": "fp4",
}
# As the inspector writes them, in words that differ by version: "Half", "Row major linear FP16". The first that fits.
_WORDS = (
    (r"bf16|bfloat16", "bf16"),
    (r"fp16|half", "fp16"),
    (r"fp32|float\b", "fp32"),
    (r"fp8", "fp8"),
    (r"int8", "int8"),
    (r"int4", "int4"),
    (r"fp4", "fp4"),
)
# Layers that move or convert values and compute nothing.
_MOVES = {
    "CAST",
    "CONCATENATION",
    "CONSTANT",
    "DEQUANTIZE",
    "GATHER",
    "IDENTITY",
    "PADDING",
    "QUANTIZE",
    "SHAPE",
    "SHUFFLE",
    "SLICE",
    "SQUEEZE",
    "UNSQUEEZE",
}
_MOST = 0.5


def network_precisions(network: Any, onnx_path: Path) -> Precisions:
    """What a strongly typed network demands of every engine that is built from it.

    A layer all of whose inputs are dequantised counts as of the quantised type: it is fused with what surrounds it.

    Args:
        network: an INetworkDefinition, parsed from the file.
        onnx_path: the file, whose initializers are the weights.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    quantised = {
        layer.get_output(0).name: layer.get_input(0).dtype.name for layer in layers if layer.type.name == "DEQUANTIZE"
    }
    counts: Counter[str] = Counter()
    for layer in layers:
        kind = layer.get_output(0).dtype.name
        if layer.type.name in _MOVES or kind not in _TYPES:
            continue
        # The third, where there is one, is a bias.
        inputs = [layer.get_input(index) for index in range(min(layer.num_inputs, 2))]
        stored = {quantised.get(tensor.name) for tensor in inputs if tensor is not None}
        counts[_TYPES[stored.pop() or kind] if len(stored) == 1 else _TYPES[kind]] += 1
    return Precisions(source="network", layers=_shares(counts), weights=_shares(onnx_weights(onnx_path)))


def onnx_weights(onnx_path: Path) -> Counter[str]:
    """Type → number of weights in an ONNX file. Scales and zero points of quantised tensors are none."""
    import onnx

    graph = onnx.load_model(onnx_path).graph
    scales = {
        name for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear") for name in node.input[1:]
    }
    counts: Counter[str] = Counter()
    for tensor in graph.initializer:
        name = _ONNX_TYPES.get(onnx.TensorProto.DataType.Name(tensor.data_type))
        if name is not None and tensor.name not in scales:
            size = 1
            for dimension in tensor.dims:
                size *= dimension
            counts[name] += size
    return counts


def engine_precisions(information: str, demanded: Precisions) -> Precisions:
    """What an engine's inspector says was built.

    Args:
        information: its JSON about the whole engine, for definite shapes, of an engine built with detailed profiling
            information.
        demanded: of the network; taken for what the inspector does not tell. Layers that the library has fused into
            kernels of its own say nothing of their weights.
    """
    layers: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for layer in json.loads(information).get("Layers", []):
        if not isinstance(layer, dict) or layer.get("LayerType") in ("Reformat", "Constant", "NoOp"):
            continue
        for part in (layer.get(key) for key in ("Weights", "Bias")):
            if isinstance(part, dict) and (kind := _kind(part.get("Type", ""))):
                weights[kind] += int(part.get("Count", 0))
        outputs = layer.get("Outputs") or [{}]
        written = " ".join(
            str(outputs[0].get(key, "")) for key in ("DataType", "Datatype", "Format/Datatype", "Format")
        )
        stored = layer.get("Weights")
        kind = _kind(stored.get("Type", "") if isinstance(stored, dict) else "") or _kind(written)
        if kind:
            layers[kind] += 1
    if not layers:
        return demanded
    return Precisions(
        source="engine", layers=_shares(layers), weights=_shares(weights) if weights else demanded.weights
    )


def _kind(words: str) -> str | None:
    return next((name for pattern, name in _WORDS if re.search(pattern, words, re.IGNORECASE)), None)


def _shares(counts: Counter[str]) -> dict[str, float]:
    total = counts.total()
    return {name: round(count / total, 4) for name, count in counts.most_common()} if total else {}


def check_precision_share(precision: str, found: Precisions, onnx_path: Path) -> None:
    """Holds what was built against what was asked for.

    Of int8 only the weights are asked: the layers between the convolutions stay in a floating-point type by design.

    Raises:
        GateError: half or less of the weights, or of the layers that compute, is in the precision (exit code 3).
    """
    asked = {"weights": found.weights} if precision == "int8" else {"layers": found.layers, "weights": found.weights}
    for what, shares in asked.items():
        if shares and shares.get(precision, 0.0) <= _MOST:
            raise GateError(
                f"{onnx_path}: asked for in {precision}, and only {shares.get(precision, 0.0):.0%} of the {what} would "
                f"be: {found.summary()}. TensorRT takes each type from the ONNX file; make that in this precision "
                f"first: litdeploy export --onnx --precision {precision}"
            )
