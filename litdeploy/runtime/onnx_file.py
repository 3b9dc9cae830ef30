"""Read ONNX files as data: sizes and external locations are checked against the bytes that exist."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from litdeploy.errors import RunnerError
from litdeploy.files import is_file, is_inside
from litdeploy.runtime.runner import ExportedFile

# Protobuf's limit for a message. Larger weights are stored in external files.
_MOST_BYTES = 2**31 - 1
# The narrowest types pack four values into a byte.
_VALUES_A_BYTE = 4


def read_model(path: Path, weights: bool = False) -> Any:
    """Read a model (`onnx.ModelProto`).

    Args:
        weights: also read weights stored in external files.

    Raises:
        RunnerError: the file is missing or not valid ONNX, a tensor claims more data than exists, or weights are stored
            outside the model's folder.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not is_file(path):
        raise RunnerError(f"{path}: no such file. Create one: litdeploy export --onnx")
    if path.stat().st_size > _MOST_BYTES:
        raise RunnerError(
            f"{path}: larger than 2 GiB, the limit of an ONNX file. Export it again: litdeploy export --onnx"
        )
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (DecodeError, OSError, ValueError):
        raise RunnerError(f"{path}: not an ONNX file, or a damaged one. Create one: litdeploy export --onnx") from None
    for tensor in _tensors(model):
        _check(tensor, path)
    if weights:
        try:
            onnx.load_external_data_for_model(model, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise RunnerError(f"{path}: its external weights cannot be read ({error}).") from None
    return model


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor, including those of nodes and nested graphs; a sparse tensor has its shape as `dims`."""
    graphs = [model.graph, *(each.algorithm for each in model.training_info)]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            yield from graph.sparse_initializer
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            yield from (each for each in (attribute.t, attribute.sparse_tensor) if each.ByteSize())
            yield from (*attribute.tensors, *attribute.sparse_tensors)
            graphs += [attribute.g, *attribute.graphs]


def _check(tensor: Any, path: Path) -> None:
    count = math.prod(tensor.dims)
    claim = f"{path}: a tensor claims the shape {list(tensor.dims)[:8]}"
    if any(size < 0 for size in tensor.dims):
        raise RunnerError(f"{claim}. The file is damaged or forged. Export it again: litdeploy export --onnx")
    external = {each.key: each.value for each in getattr(tensor, "external_data", ())}
    held = _external_bytes(external, path) if external else tensor.ByteSize()
    if count > held * _VALUES_A_BYTE:
        raise RunnerError(
            f"{claim} but holds {held:,} bytes. The file is truncated, damaged or forged. Export it again: "
            "litdeploy export --onnx"
        )


def _external_bytes(external: dict[str, str], path: Path) -> int:
    """Number of bytes of a tensor in an external file, which must be in the ONNX file's folder."""
    location = external.get("location", "")
    parts = (*PurePosixPath(location).parts, *PureWindowsPath(location).parts)
    other = path.parent / location
    leaves = not location.isprintable() or ".." in parts or PureWindowsPath(location).drive or other == path.parent
    if leaves or Path(location).is_absolute() or not is_inside(other, path.parent):
        raise RunnerError(
            f"{path}: takes weights from {location!r}, which is not in its folder. Only files in that folder are read. "
            "Move the weights there, or export the model again."
        )
    if not is_file(other):
        raise RunnerError(f"{path}: takes weights from {location!r}, which does not exist. Copy that file too.")
    size = other.stat().st_size
    try:
        start = int(external.get("offset", "0") or 0)
        length = int(external.get("length", "0") or 0) or size - start
    except ValueError:
        start, length = -1, 0
    if start < 0 or length < 0 or start + length > size:
        raise RunnerError(f"{path}: takes weights from {location!r} beyond its {size:,} bytes. Copy both files again.")
    return length


def bfloat16_emulated(path: Path) -> bytes:
    """Convert a bfloat16 ONNX model to float32 with the result of each operation rounded to bfloat16.

    For processors that have no bfloat16 kernels. Apart from the order of sums this is what a GPU computes: its
    multipliers take bfloat16 and accumulate in float32. Inputs and outputs of bfloat16 become float32.

    Returns:
        The serialized model.
    """
    import onnx
    from onnx import TensorProto, numpy_helper

    model = read_model(path, weights=True)
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    halves = {
        value.name
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16
    }
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in (*graph.input, *graph.output):
        if value.name in halves:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]

    nodes: list[Any] = []
    for value in graph.input:
        if value.name in halves:
            exact = f"{value.name}.exact"
            for node in graph.node:
                for index, name in enumerate(node.input):
                    if name == value.name:
                        node.input[index] = exact
            nodes += _to_bfloat16_and_back(value.name, exact)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.t.data_type == TensorProto.BFLOAT16:
                values = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        casts = []
        for index, name in enumerate(node.output):
            if name in halves:
                node.output[index] = f"{name}.exact"
                casts += _to_bfloat16_and_back(node.output[index], name)
        nodes += [node, *casts]
    rebuilt = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(rebuilt)
    return bytes(model.SerializeToString())


def _to_bfloat16_and_back(source: str, target: str) -> list[Any]:
    from onnx import TensorProto, helper

    between = f"{source}.bf16"
    return [
        helper.make_node("Cast", [source], [between], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", [between], [target], to=TensorProto.FLOAT),
    ]


def describe_onnx(path: Path) -> dict[str, Any]:
    """What an ONNX file says of itself: `opset`, `metadata`, and all of `ends_of`.

    Raises:
        RunnerError: no such file, or no ONNX.
    """
    model = read_model(path)
    try:
        ends = ends_of(model.graph)
    except IndexError:
        raise RunnerError(
            f"{path}: not an ONNX file with an input and an output. Make one: litdeploy export --onnx"
        ) from None
    return {
        "opset": next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0),
        **ends,
        "metadata": {each.key: each.value for each in model.metadata_props},
    }


def describe(path: Path, device: torch.device) -> ExportedFile:
    """See `DescribeFunction`.

    Raises:
        RunnerError: as `describe_onnx`.
    """
    found = describe_onnx(path)
    sizes = tuple(found["input_shape"][1:])
    fixed = len(sizes) == 3 and all(isinstance(size, int) for size in sizes)
    return ExportedFile(found["metadata"], sizes if fixed else None, output_shape=tuple(found["output_shape"]))


def ends_of(graph: Any) -> dict[str, Any]:
    """Names and shapes of a graph's inputs and outputs; `input`, `input_shape`, `output`, `output_shape`: the first."""
    return {
        "input": graph.input[0].name,
        "output": graph.output[0].name,
        "input_shape": shape_of(graph.input[0]),
        "output_shape": shape_of(graph.output[0]),
        "inputs": {each.name: shape_of(each) for each in graph.input},
        "outputs": {each.name: shape_of(each) for each in graph.output},
    }


def shape_of(value: Any) -> list[int | str]:
    """Sizes of an input or output; a symbolic one by its name."""
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
