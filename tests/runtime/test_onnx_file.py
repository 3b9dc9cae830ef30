from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper

from litdeploy.config.target import Precision
from litdeploy.errors import RunnerError
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.precision import convert
from litdeploy.inspection import inspect
from litdeploy.networks import Network
from litdeploy.runtime import open_runner
from litdeploy.runtime.onnx_file import bfloat16_emulated, read_model


def external(location: str, **more: int) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def saved(folder: Path, *initializers: TensorProto, nodes: Any = ()) -> Path:
    graph = helper.make_graph(list(nodes), "g", [], [], list(initializers))
    path = folder / "in" / "a.onnx"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    (folder / "secret").write_bytes(bytes(16))
    return path


def test_weights_beside_it_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path, external("w.bin", length=16))
    (tmp_path / "in" / "w.bin").write_bytes(np.ones(4, np.float32).tobytes())
    assert isinstance(read_model(path), ModelProto)
    [tensor] = read_model(path, weights=True).graph.initializer
    assert numpy_helper.to_array(tensor).sum() == 4


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link", "..\\secret", "C:\\secret", "", "a\0b", "."])
def test_weights_elsewhere_are_not_read(tmp_path: Path, location: str) -> None:
    path = saved(tmp_path, external(location))
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(RunnerError, match="not in its folder"):
        read_model(path)


@pytest.mark.parametrize("part", [{"offset": 8, "length": 16}, {"offset": -8}, {"length": 10**12}])
def test_weights_beyond_their_file_are_not_read(tmp_path: Path, part: dict[str, int]) -> None:
    path = saved(tmp_path, external("w.bin", **part))
    (tmp_path / "in" / "w.bin").write_bytes(bytes(16))
    with pytest.raises(RunnerError, match="beyond its 16 bytes"):
        read_model(path)


def _claims(*dims: int) -> TensorProto:
    return TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=bytes(8))


def test_a_tensor_that_claims_more_than_it_has_is_refused_wherever_it_is(tmp_path: Path) -> None:
    inner = helper.make_graph([], "inner", [], [], [_claims(10**12)])
    constant = helper.make_node("Constant", [], ["c"], value=_claims(10**6, 10**6))
    sparse = helper.make_node("Constant", [], ["c"])
    sparse.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR).sparse_tensor.dims.append(10**12)
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    for path in (
        saved(tmp_path, _claims(10**12)),
        saved(tmp_path, _claims(-1)),
        saved(tmp_path, nodes=[constant]),
        saved(tmp_path, nodes=[sparse]),
        saved(tmp_path, nodes=[branch]),
    ):
        with pytest.raises(RunnerError, match="a tensor claims the shape"):
            read_model(path)


def test_a_file_too_long_for_the_format_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.onnx").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(RunnerError, match="larger than 2 GiB"):
        read_model(tmp_path / "a.onnx")


def test_names_that_are_no_text_are_told(tmp_path: Path) -> None:
    """As 10,000 mutations found."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 8, 8]) for name in ("images", "logits")
    ]
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["logits"])], "g", inputs[:1], inputs[1:])
    content = helper.make_model(graph).SerializeToString().replace(b"batch", b"b\xff\xfech")
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(RunnerError, match="not text"):
        inspect(tmp_path / "a.onnx")


@pytest.mark.parametrize("io_precision", ["fp32", "bf16"])
def test_every_value_is_one_of_bfloat16(network: Network, tmp_path: Path, io_precision: Precision) -> None:
    path = tmp_path / "bf16.onnx"
    batch = network.example(16)
    export_onnx(network, path, None, conversion=convert(network, "bf16", [batch]), io_precision=io_precision)
    model = onnx.load_from_string(bfloat16_emulated(path))
    assert not [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.BFLOAT16]
    with open_runner("onnxruntime", path=path, device=torch.device("cpu")) as runner:
        found = runner.run(batch)
        description = runner.describe()
    assert (description.precision, description.mode) == ("bf16", "CPUExecutionProvider, fp32 rounded to bf16")
    with torch.no_grad():
        expected = network.module(batch)
        in_torch = convert(network, "bf16", [batch]).module(batch).float()
    scale = expected.abs().max()
    assert 0 < (found - expected).abs().max() < 0.03 * scale
    # It is as far from fp32 as torch's own bf16 is, and nearer to that.
    assert (found - in_torch).abs().max() < 0.02 * scale
