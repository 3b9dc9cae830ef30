"""Networks that are not litdeploy's own: a vision transformer of `transformers`, and the one of `examples/`."""

from __future__ import annotations

import runpy
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto

from litdeploy.bundle import Artefact, sha256_of
from litdeploy.exporter.conversion import convert
from litdeploy.exporter.forms import FORMS
from litdeploy.exporter.inductor import export_aoti
from litdeploy.exporter.onnx import export_onnx
from litdeploy.exporter.parity import Parity, verify
from litdeploy.exporter.quantize import quantise_onnx
from litdeploy.exporter.staging import write_sidecar
from litdeploy.networks import Network, load
from litdeploy.runtime import Runner, open_runner
from litdeploy.target import Precision, Target

CPU = torch.device("cpu")
OWN_NETWORK = Path(__file__).parents[2] / "examples" / "own_network.py"


@pytest.fixture(scope="module", params=["vit", "example"])
def network(request: pytest.FixtureRequest) -> Network:
    torch.manual_seed(0)
    if request.param == "example":
        return load(runpy.run_path(str(OWN_NETWORK))["network"](), input_shape=(1, 8, 8), normalise="half")
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=10,
    )
    return load(transformers.ViTForImageClassification(config), input_shape=(3, 16, 16), normalise="half")


def parity(network: Network, candidate: Runner, precision: Precision) -> Parity:
    tolerance = getattr(Target().tolerance, precision)
    with open_runner("eager", network=network, device=CPU) as reference, candidate:
        # New weights give logits that lie near to one another: the class tells nothing.
        return verify(reference, candidate, network.example(32), (1, 8), tolerance.model_copy(update={"top1": 0.0}))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_onnx(network: Network, tmp_path: Path, precision: Precision) -> None:
    path = tmp_path / "network.onnx"
    if precision == "int8":
        export_onnx(network, tmp_path / "fp32.onnx", None)
        details = quantise_onnx(tmp_path / "fp32.onnx", path, network.example(64))
        assert details["quantised"]
        graph = onnx.load_model(path).graph
        stored = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT8}
        others = [node for node in graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
        assert not [node.name for node in others if stored.intersection(node.input)]
    else:
        conversion = None if precision == "fp32" else convert(network, precision, [network.example(16)])
        export_onnx(network, path, None, conversion=conversion)
    found = parity(network, open_runner("onnxruntime", onnx_path=path, device=CPU), precision)
    assert found.within, found.told()


@pytest.mark.slow
def test_aoti(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "network.pt2"
    details = export_aoti(network, path, CPU)
    versions = FORMS["aoti"].versions()
    artefact = Artefact(path=path.name, sha256=sha256_of(path), precision="fp32", versions=versions, details=details)
    write_sidecar(path, artefact)
    found = parity(network, open_runner("inductor", package_path=path, device=CPU), "fp32")
    assert found.within, found.told()
