"""Which layer an ONNX file computes differently: outputs of layers, beside those of the network's own."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from litdeploy.batch import Batch, cast, forward
from litdeploy.config.target import Tolerance
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.networks import Network
from litdeploy.networks.folding import folded
from litdeploy.runtime.adapter import read_adapter
from litdeploy.runtime.onnx_file import bfloat16_emulated, read_model
from litdeploy.storage.records import Record

Values = dict[str, NDArray[np.float32]]
# How near the fresh float32 file must be for a layer's output to be taken as found.
_SAME = Tolerance(atol=1e-3, rtol=1e-3)


class Parting(Record):
    """The first layer whose outputs part.

    Attributes:
        layer: its name in the network.
        max_absolute, max_relative: largest difference; the latter over the largest magnitude of the network's output.
            None where the file's output is NaN or infinite.
        compared: how many layers could be compared, this one and those before it included.
    """

    layer: str
    max_absolute: float | None
    max_relative: float | None
    compared: int


def first_parting(network: Network, path: Path, inputs: Batch, tolerance: Tolerance) -> Parting | None:
    """The first layer, in the order in which they end, whose output differs from the network's by more than allowed.

    A layer's output in the file is that of the last node named for it. That this is so is tried on a file that is
    exported afresh in float32: a layer whose output is not found there is left out.

    Args:
        network: in float32, on the CPU.
        path: an ONNX file of `export_onnx`, in any precision.
        inputs: of a few samples, on the CPU.

    Returns:
        None where no layer's outputs part.
    """
    expected = _outputs(network, inputs)
    with TemporaryDirectory() as folder:
        fresh = Path(folder) / "fresh.onnx"
        export_onnx(network, fresh, None)
        known = _intermediates(fresh, list(expected), inputs)
    layers = [name for name in expected if name in known and _differs(expected[name], known[name], _SAME) is None]
    found = _intermediates(path, layers, inputs)
    compared = 0
    for layer in layers:
        if layer not in found:
            continue
        compared += 1
        difference = _differs(expected[layer], found[layer], tolerance)
        if difference is not None:
            absolute, relative = difference
            finite = bool(np.isfinite(found[layer]).all())
            return Parting(
                layer=layer,
                max_absolute=absolute if finite else None,
                max_relative=relative if finite else None,
                compared=compared,
            )
    return None


def _outputs(network: Network, inputs: Batch) -> Values:
    """Outputs of the layers that run once, in the order in which they end, batch norms folded as the file has them."""
    module = folded(network)
    runs: dict[str, list[Tensor]] = {}
    for name, child in module.named_modules():
        if name and not isinstance(child, nn.Identity):

            def note(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    runs.setdefault(name, []).append(output.clone())

            child.register_forward_hook(note)
    with torch.no_grad():
        forward(module, inputs)
    return {name: outputs[0].float().numpy() for name, outputs in runs.items() if len(outputs) == 1}


def _intermediates(path: Path, layers: list[str], inputs: Batch) -> Values:
    """What a file computes for each of the layers that it has nodes of."""
    import onnx
    import onnxruntime

    model = read_model(path, weights=True)
    adapter = read_adapter({each.key: each.value for each in model.metadata_props}, str(path))
    taken = adapter.adapt(inputs)
    if adapter.precision == "bf16":
        model, taken = onnx.load_from_string(bfloat16_emulated(path)), cast(taken, torch.float32)
    values = {}
    for layer in layers:
        nodes = [node for node in model.graph.node if _belongs(node.name, layer)]
        if nodes:
            values[layer] = nodes[-1].output[0]
    there = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in dict.fromkeys(values.values()) if name not in there
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = list(dict.fromkeys(values.values()))
    tensors = taken if isinstance(taken, dict) else {model.graph.input[0].name: taken}
    results = session.run(names, {name: tensor.numpy() for name, tensor in tensors.items()})
    by_name = dict(zip(names, results, strict=True))
    return {layer: by_name[name].astype(np.float32) for layer, name in values.items()}


def _belongs(node: str, layer: str) -> bool:
    """Whether a node, named `LAYER/TYPE_NUMBER`, is part of a layer."""
    owner, _, rest = node.partition("/")
    return bool(rest) and (owner == layer or owner.startswith(f"{layer}."))


def _differs(
    expected: NDArray[np.float32], found: NDArray[np.float32], tolerance: Tolerance
) -> tuple[float, float] | None:
    """Largest absolute and relative difference where they are beyond the tolerance, or the shapes are unlike."""
    if expected.shape != found.shape:
        return float("inf"), float("inf")
    absolute = float(np.abs(found - expected).max())
    largest = float(np.abs(expected).max())
    if absolute <= tolerance.atol + tolerance.rtol * largest:
        return None
    return absolute, absolute / max(largest, float(np.finfo(np.float32).tiny))
