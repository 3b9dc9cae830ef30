"""An ONNX file as data: its sizes and the places that it names are held against what is there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from litdeploy.errors import RunnerError
from litdeploy.files import is_file, is_inside

# Of protobuf: a message is no longer. Larger weights lie in files beside it.
_MOST_BYTES = 2**31 - 1
# The narrowest types have four values in a byte.
_VALUES_A_BYTE = 4


def read_model(path: Path, weights: bool = False) -> Any:
    """The model (`onnx.ModelProto`).

    Args:
        weights: whether those in files beside it are read too.

    Raises:
        RunnerError: no such file, or no whole ONNX; a tensor that claims more than there is; weights in a file that is
            not beside it.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not is_file(path):
        raise RunnerError(f"{path}: no such file. Make one: litdeploy export --onnx")
    if path.stat().st_size > _MOST_BYTES:
        raise RunnerError(f"{path}: larger than 2 GiB, which no ONNX file is. Make it again: litdeploy export --onnx")
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (DecodeError, OSError, ValueError):
        raise RunnerError(f"{path}: not an ONNX file, or a damaged one. Make one: litdeploy export --onnx") from None
    for tensor in _tensors(model):
        _check(tensor, path)
    if weights:
        try:
            onnx.load_external_data_for_model(model, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise RunnerError(f"{path}: its weights, which lie in other files, cannot be read ({error}).") from None
    return model


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor, in nodes and in graphs inside nodes too; a sparse one as its values, and its shape as `dims`."""
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
        raise RunnerError(f"{claim}. It is damaged or made up. Make it again: litdeploy export --onnx")
    external = {each.key: each.value for each in getattr(tensor, "external_data", ())}
    held = _external_bytes(external, path) if external else tensor.ByteSize()
    if count > held * _VALUES_A_BYTE:
        raise RunnerError(
            f"{claim}, and there are {held:,} bytes of it. It is truncated, damaged or made up. Make it again: "
            "litdeploy export --onnx"
        )


def _external_bytes(external: dict[str, str], path: Path) -> int:
    """How many bytes a tensor has in another file, which must lie in the ONNX file's folder."""
    location = external.get("location", "")
    parts = (*PurePosixPath(location).parts, *PureWindowsPath(location).parts)
    other = path.parent / location
    leaves = not location.isprintable() or ".." in parts or PureWindowsPath(location).drive or other == path.parent
    if leaves or Path(location).is_absolute() or not is_inside(other, path.parent):
        raise RunnerError(
            f"{path}: takes weights from {location!r}, which is not in its folder. Nothing else is read; put the "
            "weights beside it, or export it again."
        )
    if not is_file(other):
        raise RunnerError(f"{path}: takes weights from {location!r}, and there is no such file. Copy that too.")
    size = other.stat().st_size
    try:
        start = int(external.get("offset", "0") or 0)
        length = int(external.get("length", "0") or 0) or size - start
    except ValueError:
        start, length = -1, 0
    if start < 0 or length < 0 or start + length > size:
        raise RunnerError(f"{path}: takes weights from {location!r} beyond its {size:,} bytes. Copy both again.")
    return length
