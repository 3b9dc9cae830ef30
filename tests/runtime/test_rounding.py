from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto

from litdeploy.config.target import Precision
from litdeploy.exporter.conversion import convert
from litdeploy.exporter.onnx import export_onnx
from litdeploy.networks import Network
from litdeploy.runtime import open_runner
from litdeploy.runtime.rounding import rounded


@pytest.mark.parametrize("io_precision", ["fp32", "bf16"])
def test_every_value_is_one_of_bfloat16(network: Network, tmp_path: Path, io_precision: Precision) -> None:
    path = tmp_path / "bf16.onnx"
    batch = network.example(16)
    export_onnx(network, path, None, conversion=convert(network, "bf16", [batch]), io_precision=io_precision)
    model = onnx.load_from_string(rounded(path))
    assert not [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.BFLOAT16]
    with open_runner("onnxruntime", onnx_path=path, device=torch.device("cpu")) as runner:
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
