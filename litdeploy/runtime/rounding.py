"""bfloat16 where there are no kernels for it: each operation in float32, its result rounded to bfloat16.

That is what a GPU computes, but for the order of its sums: its multipliers take bfloat16 and add in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from litdeploy.runtime.onnx_file import read_model


def rounded(path: Path) -> bytes:
    """An ONNX model in bfloat16 as one in float32 whose values are all bfloat16's.

    Inputs and outputs of bfloat16 become float32.

    Returns:
        The model, serialised.
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
