"""Find the first layer that an ONNX file computes differently, by comparing the outputs of layers with PyTorch's."""

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
# How close a fresh float32 export must be for a layer's output to count as located.
_SAME = Tolerance(atol=1e-3, rtol=1e-3)


class Parting(Record):
    """The first layer whose outputs differ.

    Attributes:
        layer: its name in the network.
        max_absolute, max_relative: largest difference, absolute and relative to the largest magnitude of the network's
            output. None if the file's output is NaN or infinite.
        compared: number of layers compared, up to and including this one.
    """

    layer: str
    max_absolute: float | None
    max_relative: float | None
    compared: int


def first_parting(network: Network, path: Path, inputs: Batch, tolerance: Tolerance) -> Parting | None:
    """Find the first layer, in order of completion, whose output differs from the network's beyond the tolerance.

    A layer's output in the file is that of the last node named after it. This is checked on a fresh float32 export:
    layers whose output cannot be located there are skipped.

    Args:
        network: in float32, on the CPU.
        path: an ONNX file of `export_onnx`, in any precision.
        inputs: of a few samples, on the CPU.

    Returns:
        The layer, or None if no outputs differ.
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
    """Outputs of the layers that run once, in order of completion, with batch norms folded as in the file."""
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
    """Outputs of each layer that the file has nodes of."""
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
    """Whether a node, named `LAYER/TYPE_NUMBER`, belongs to a layer."""
    owner, _, rest = node.partition("/")
    return bool(rest) and (owner == layer or owner.startswith(f"{layer}."))


def _differs(
    expected: NDArray[np.float32], found: NDArray[np.float32], tolerance: Tolerance
) -> tuple[float, float] | None:
    """Largest absolute and relative difference if beyond the tolerance, infinite for different shapes; else None."""
    if expected.shape != found.shape:
        return float("inf"), float("inf")
    absolute = float(np.abs(found - expected).max())
    largest = float(np.abs(expected).max())
    if absolute <= tolerance.atol + tolerance.rtol * largest:
        return None
    return absolute, absolute / max(largest, float(np.finfo(np.float32).tiny))
