"""Precisions of an exported file: fp16 and bf16 by conversion, int8 by quantization, and what an engine really holds.

**fp16 and bf16.** A network's computation is a sequence of calls to torch's functions, the same for every batch. A
first run in fp32 records the largest magnitude that goes into and comes out of each call on real images. The converted
network makes the same calls, each with its tensors cast to the type chosen for it; the head, and operations that would
overflow, stay in fp32. So a sum or an attention written in `forward` is guarded like a layer.

**int8.** Static quantization of the ONNX file, with QuantizeLinear and DequantizeLinear nodes that onnxruntime and
TensorRT both take.

**Engines.** TensorRT takes each type from the ONNX file and may choose others: the share of layers and weights in the
requested precision is checked.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from litdeploy.batch import Batch, forward, in_parts
from litdeploy.config.target import Precision
from litdeploy.errors import GateError, NetworkError
from litdeploy.networks import Network
from litdeploy.networks.folding import folded
from litdeploy.networks.output import named_tensors
from litdeploy.runtime.adapter import read_adapter
from litdeploy.runtime.device import DTYPES
from litdeploy.runtime.engine import Precisions

# Share of the type's largest number that a measured value may reach: other images than those measured go higher, and
# a sum may be larger on its way than at its end.
SAFE_SHARE = 0.25

# Not counted, and left unchanged: a forward that compares types calls them or not, by the type of its weights.
_CONVERSIONS = frozenset(
    {
        Tensor.to,
        Tensor.float,
        Tensor.half,
        Tensor.bfloat16,
        Tensor.double,
        Tensor.type,
        Tensor.type_as,
    }
)

# ONNX has none of them in bfloat16.
_NOT_IN_BF16 = frozenset({torch.topk, Tensor.topk, torch.sort, Tensor.sort})


@dataclass(eq=False)
class Call:
    """One call of a torch function, over all images that were measured.

    Attributes:
        function: what was called.
        layer: name of the module that called it; empty for the network itself.
        largest: largest magnitude of what went in or came out; infinite where a value was.
        tensors: ids of the parameters and buffers among its arguments.
        head: whether it is the last with weights before an output, or comes between that and the output.
    """

    function: Any
    layer: str
    largest: float = 0.0
    tensors: set[int] = field(default_factory=set)
    head: bool = False

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether this type holds its values with room to spare."""
        if dtype is torch.bfloat16 and self.function in _NOT_IN_BF16:
            return False
        return self.largest <= SAFE_SHARE * torch.finfo(dtype).max


@dataclass(frozen=True)
class Conversion:
    """A converted network and the reasons for its types.

    Attributes:
        module: what the network takes, in any floating type → logits (N, classes), in the type of its last operation.
        precision: of all but what is kept.
        largest: largest magnitude of any value in it, on the images measured.
        largest_layer: the layer that has it.
        kept: layers with operations that stay in fp32, in their order; the last is the head.
    """

    module: nn.Module
    precision: Precision
    largest: float
    largest_layer: str
    kept: tuple[str, ...]


def convert(network: Network, precision: Precision, batches: Iterable[Batch]) -> Conversion:
    """Convert a copy of a network, its batch norms folded.

    The last layer with weights before each output stays in fp32: at 16, a step of bfloat16 is 1/8, in which classes
    with nearly equal logits become one.

    Args:
        precision: `fp16` or `bf16`.
        batches: what the network takes (normalized images (N, C, H, W), float32), on its device.

    Raises:
        NetworkError: its forward does not call the same functions for each batch.
    """
    dtype = DTYPES[precision]
    module = folded(network)
    calls = measured(module, batches)
    wide = [call for call in calls if call.head or not call.fits(dtype)]
    kept_tensors = {tensor for call in wide for tensor in call.tensors}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and id(tensor) not in kept_tensors:
            tensor.data = tensor.data.to(dtype)
    plan = [(call.function, torch.float32 if call in wide else dtype) for call in calls]
    return Conversion(
        _Converted(module, plan, network.source),
        precision=precision,
        largest=max((call.largest for call in calls), default=0.0),
        largest_layer=max(calls, key=lambda call: call.largest).layer if calls else "",
        kept=tuple(dict.fromkeys(call.layer for call in wide)),
    )


def measured(module: nn.Module, batches: Iterable[Batch]) -> list[Call]:
    """Record the calls that a module makes, with the largest magnitudes over all batches."""
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    calls: list[Call] = []
    with torch.no_grad(), _layers(module) as layer:
        for batch in batches:
            with _Measure(calls, layer, known) as measure:
                output = forward(module, batch)
            for tensor in named_tensors(output).values():
                # The last call with weights among those that led to the output, and what comes after it.
                path = measure.paths.get(tensor, frozenset(range(len(calls))))
                head = max((index for index in path if calls[index].tensors), default=len(calls))
                for index in path:
                    calls[index].head |= index >= head
    return calls


@contextmanager
def _layers(module: nn.Module) -> Iterator[Callable[[], str]]:
    """Yield a function that returns the name of the innermost module that runs."""
    running: list[str] = [""]

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for name, child in module.named_modules():
        if name:
            handles.append(child.register_forward_pre_hook(enter(name)))
            handles.append(child.register_forward_hook(leave))
    try:
        yield lambda: running[-1]
    finally:
        for handle in handles:
            handle.remove()


class _Counted(TorchFunctionMode):
    """Number the calls that take floating tensors and give some: those that a type can be chosen for."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        uncounted = function in _CONVERSIONS or getattr(function, "__name__", "") == "__get__"
        if uncounted or next(_floating((args, kwargs)), None) is None:
            return self.skip(function, args, kwargs)
        return self.call(function, args, kwargs)

    def skip(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(*args, **kwargs)

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class _Measure(_Counted):
    """Measure one batch.

    Attributes:
        paths: tensor → the places of the calls that led to it.
    """

    def __init__(self, calls: list[Call], layer: Callable[[], str], known: set[int]) -> None:
        super().__init__()
        self._calls, self._layer, self._known = calls, layer, known
        self._next = 0
        # Weak: the activations of a batch are freed as the network goes on.
        self.paths: MutableMapping[Tensor, frozenset[int]] = WeakIdKeyDictionary()

    def skip(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self._path((args, kwargs))
        result = function(*args, **kwargs)
        self._lead(path, result)
        return result

    def _path(self, given: Any) -> frozenset[int]:
        return frozenset().union(*(self.paths.get(tensor, frozenset()) for tensor in _floating(given)))

    def _lead(self, path: frozenset[int], result: Any) -> None:
        for tensor in _floating(result):
            self.paths[tensor] = path

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._next == len(self._calls):
            self._calls.append(Call(function, self._layer()))
        call = self._calls[self._next]
        path = self._path((args, kwargs)) | {self._next}
        self._next += 1
        given = list(_floating((args, kwargs)))
        # Before the call, which may write into one of them.
        magnitudes = [_magnitude(tensor) for tensor in given]
        result = function(*args, **kwargs)
        magnitudes += [_magnitude(tensor) for tensor in _floating(result)]
        call.largest = max(call.largest, *magnitudes)
        call.tensors |= {id(tensor) for tensor in given} & self._known
        self._lead(path, result)
        return result


class _Cast(_Counted):
    def __init__(self, plan: list[tuple[Any, torch.dtype]], source: str) -> None:
        super().__init__()
        self._plan, self._source = plan, source
        self._next = 0

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._next == len(self._plan) or self._plan[self._next][0] != function:
            raise NetworkError(
                f"{self._source}: its forward does not make the same calls each time, so that it cannot be converted "
                "call by call. Export it in fp32: --precision fp32"
            )
        dtype = self._plan[self._next][1]
        self._next += 1
        return function(*_cast(args, dtype), **_cast(kwargs, dtype))


class _Converted(nn.Module):
    def __init__(self, module: nn.Module, plan: list[tuple[Any, torch.dtype]], source: str) -> None:
        super().__init__()
        self.module = module
        self._plan, self._source = plan, source

    def forward(self, *single: Tensor, **several: Tensor) -> Any:
        with _Cast(self._plan, self._source):
            return self.module(*single, **several)


def _magnitude(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    largest = tensor.detach().abs().max().item()
    return largest if largest == largest else float("inf")


def _floating(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, dict):
        yield from _floating(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _floating(value)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() and values.dtype != dtype else values
    if isinstance(values, dict):
        return {name: _cast(value, dtype) for name, value in values.items()}
    if isinstance(values, tuple | list):
        return type(values)(_cast(value, dtype) for value in values)
    return values


# int8: quantization of the ONNX file

_MULTIPLICATIONS = ("Conv", "Gemm", "MatMul")
# What costs time, and the additions between, so that int8 is not left and entered again at each shortcut.
_QUANTIZED = (*_MULTIPLICATIONS, "Add")
_CALIBRATION_BATCH = 64


def quantize_onnx(source: Path, path: Path, inputs: Batch) -> dict[str, Any]:
    """Write a float32 ONNX file of `export_onnx` in int8.

    Weights are symmetric, one scale a channel; activations symmetric, one scale a tensor, from the least and largest
    value on the calibration images. Symmetric, since TensorRT takes no zero point; for the same reason biases stay
    float32, and a weight is stored in int8 right before its DequantizeLinear.

    Args:
        source: the float32 file.
        path: of the file to write.
        inputs: what to calibrate on, as the network takes it (normalized float32 images), on the CPU.

    Returns:
        `quantised`: number of nodes of each type that take int8; `bytes`.

    Raises:
        NetworkError: nothing in it can be quantized.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = onnx.load_model(source)
    properties = {each.key: each.value for each in model.metadata_props}
    adapter = read_adapter(properties)
    batches = [_arrays(adapter.adapt(part), model.graph.input[0].name) for part in in_parts(inputs, _CALIBRATION_BATCH)]
    with _quiet():
        quantize_static(
            source,
            path,
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTIZED),
            nodes_to_exclude=_other_additions(model.graph),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                # What goes in is quantized, and not what comes out: else each convolution is rounded before its ReLU
                # and after it. ResNet-20 on 2,048 images of CIFAR-10: logits 0.18 from fp32 (root mean square) and not
                # 0.20, and no slower.
                "OpTypesToExcludeOutputQuantization": list(_QUANTIZED),
            },
        )
    quantised = onnx.load_model(path)
    onnx.helper.set_model_props(quantised, {**properties, "precision": "int8"})
    onnx.checker.check_model(quantised, full_check=True)
    onnx.save_model(quantised, path)
    counts = _quantized(quantised.graph)
    if not counts:
        raise NetworkError(
            f"nothing in the network can be quantized: it has no {', '.join(_QUANTIZED)} with fixed weights. Export it "
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
    """Silence its advice on the root logger to preprocess a file, which export_onnx has done; and, before onnxruntime
    1.31, numpy's words on scales that it computes for all that is added, and uses for what is quantized only."""
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


def _quantized(graph: Any) -> dict[str, int]:
    """Node type → how many of them take an input from a DequantizeLinear."""
    dequantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return dict(
        Counter(
            node.op_type for node in graph.node if node.op_type in _QUANTIZED and dequantised.intersection(node.input)
        )
    )


# Engines: the types that TensorRT chose

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
    """Precisions that a strongly typed network requires of every engine that is built from it.

    A layer all of whose inputs are dequantized counts as the quantized type: it is fused with what surrounds it.

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
        # A third input is a bias.
        inputs = [layer.get_input(index) for index in range(min(layer.num_inputs, 2))]
        stored = {quantised.get(tensor.name) for tensor in inputs if tensor is not None}
        counts[_TYPES[stored.pop() or kind] if len(stored) == 1 else _TYPES[kind]] += 1
    return Precisions(source="network", layers=_shares(counts), weights=_shares(onnx_weights(onnx_path)))


def onnx_weights(onnx_path: Path) -> Counter[str]:
    """Type → number of weights in an ONNX file. Scales and zero points of quantized tensors do not count."""
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


def engine_precisions(information: str, required: Precisions) -> Precisions:
    """Precisions that were built, as an engine's inspector reports them.

    Args:
        information: its JSON about the whole engine, for definite shapes, of an engine built with detailed profiling
            information.
        required: of the network; used if the inspector reports nothing, as for the weights of layers that the
            library has fused into its own kernels.
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
        return required
    return Precisions(
        source="engine", layers=_shares(layers), weights=_shares(weights) if weights else required.weights
    )


def _kind(words: str) -> str | None:
    return next((name for pattern, name in _WORDS if re.search(pattern, words, re.IGNORECASE)), None)


def _shares(counts: Counter[str]) -> dict[str, float]:
    total = counts.total()
    return {name: round(count / total, 4) for name, count in counts.most_common()} if total else {}


def check_precision_share(precision: str, found: Precisions, onnx_path: Path) -> None:
    """Check what was built against what was requested.

    For int8 only the weights are checked: the layers between the convolutions stay in a floating-point type by design.

    Raises:
        GateError: half or less of the weights, or of the layers that compute, is in the precision (exit code 3).
    """
    measured = {"weights": found.weights} if precision == "int8" else {"layers": found.layers, "weights": found.weights}
    for what, shares in measured.items():
        if shares and shares.get(precision, 0.0) <= _MOST:
            raise GateError(
                f"{onnx_path}: {precision} was requested, and only {shares.get(precision, 0.0):.0%} of the {what} "
                f"would be in it: {found.summary()}. TensorRT takes each type from the ONNX file; export that in this "
                f"precision first: litdeploy export --onnx --precision {precision}"
            )
