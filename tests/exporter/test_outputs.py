"""Files with several outputs: all of them, by their names, in each format."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from litdeploy.batch import mapped
from litdeploy.config.spec import InputSpec
from litdeploy.config.target import Precision, Target
from litdeploy.errors import NetworkError
from litdeploy.evaluation.bisect import first_parting
from litdeploy.exporter.build import Job, build_artefact
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.parity import compare_runners
from litdeploy.exporter.precision import convert, quantize_onnx
from litdeploy.exporter.triton_repository import triton_repository
from litdeploy.networks import Network, load
from litdeploy.runtime import Runner, open_runner
from litdeploy.storage.records import Parity

CPU = torch.device("cpu")
NAMES = ["boxes", "scores", "parts.output0", "parts.output1", "found"]


class Detector(nn.Module):
    """Two heads with weights, a nested tuple, and truth values."""

    input_spec = InputSpec(shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)

    def __init__(self, last: str = "found") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.boxes, self.scores, self.last = nn.Linear(8, 4), nn.Linear(8, 2), last

    def forward(self, images: Tensor) -> dict[str, object]:
        maps = self.conv(images).relu()
        pooled = maps.mean((2, 3))
        scores = self.scores(pooled)
        parts = (maps[:, :2], pooled)
        return {"boxes": 100 * self.boxes(pooled), "scores": scores, "parts": parts, self.last: scores[:, 0] > 0}


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return load(Detector().eval())


@pytest.fixture(scope="module")
def path(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outputs") / "network.onnx"
    details = export_onnx(network, path, None)
    assert list(details["outputs"]) == NAMES
    assert details["outputs"]["parts.output0"] == ["batch", 2, 8, 8]
    return path


def parity(network: Network, candidate: Runner, precision: Precision = "fp32") -> Parity:
    tolerance = getattr(Target().tolerance, precision)
    with open_runner("eager", network=network, device=CPU) as reference, candidate:
        return compare_runners(reference, candidate, network.example(16), (1, 8), tolerance, network.spec)


def test_a_runner_gives_them_all_by_name(network: Network, path: Path) -> None:
    batch = network.example(3)
    with open_runner("onnxruntime", path=path, device=CPU) as runner:
        found = runner.run(batch)
    assert isinstance(found, dict)
    with torch.no_grad():
        expected = network.module(batch)
    assert list(found) == NAMES
    assert found["found"].dtype is torch.bool
    torch.testing.assert_close(found["boxes"], expected["boxes"])
    torch.testing.assert_close(found["parts.output1"], expected["parts"][1])
    assert parity(network, open_runner("onnxruntime", path=path, device=CPU)).within


def test_both_heads_stay_in_fp32_in_a_lower_precision(network: Network, path: Path, tmp_path: Path) -> None:
    conversion = convert(network, "fp16", [network.example(16)])
    assert {"boxes", "scores"} <= set(conversion.kept)
    export_onnx(network, tmp_path / "half.onnx", None, conversion=conversion)
    quantize_onnx(path, tmp_path / "int8.onnx", network.example(64))
    for precision, name in (("fp16", "half.onnx"), ("int8", "int8.onnx")):
        found = parity(network, open_runner("onnxruntime", path=tmp_path / name, device=CPU), precision)
        assert found.within, found.summary()


def test_the_tensor_that_differs_is_named_and_its_layer_found(network: Network, path: Path, tmp_path: Path) -> None:
    model = onnx.load_model(path)
    bias = next(each for each in model.graph.initializer if each.name.endswith("boxes.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save_model(model, tmp_path / "tampered.onnx")
    found = parity(network, open_runner("onnxruntime", path=tmp_path / "tampered.onnx", device=CPU))
    assert not found.within
    assert {batch.tensor for batch in found.batches} == {"boxes"}
    assert " in boxes, " in found.summary()
    parting = first_parting(network, tmp_path / "tampered.onnx", network.example(4), Target().tolerance.fp32)
    assert parting is not None
    assert parting.layer == "boxes"


@pytest.mark.slow
def test_compiled_and_eager_runners_give_the_same(network: Network) -> None:
    found = parity(network, open_runner("compiled", network=network, device=CPU))
    assert found.within, found.summary()


@pytest.mark.slow
def test_a_package_and_its_triton_model_have_them(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "network.pt2"
    artefact = build_artefact("aoti", Job(network, Target(device="cpu"), CPU), path, path.name)
    assert list(artefact.details["outputs"]) == NAMES
    assert artefact.details["outputs"]["found"] == {"type": "bool", "shape": ["batch"]}
    with open_runner("inductor", path=path, device=CPU) as runner:
        answer = runner.run(network.example(3))
    assert isinstance(answer, dict)
    assert list(answer) == NAMES
    assert mapped(lambda tensor: tensor[:2], answer).keys() == answer.keys()
    assert parity(network, open_runner("inductor", path=path, device=CPU)).within
    [model] = triton_repository([(path, artefact)], tmp_path / "models", classes=(), batch_sizes=(1, 4), device="cpu")
    config = (model / "config.pbtxt").read_text()
    assert [config.count(f'"OUTPUT__{place}"') for place in range(6)] == [1, 1, 1, 1, 1, 0]
    assert "TYPE_BOOL" in config


def test_a_triton_model_of_an_onnx_file_names_them(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    artefact = build_artefact("onnx", Job(network, Target(device="cpu"), CPU), path, path.name)
    [model] = triton_repository([(path, artefact)], tmp_path / "models", classes=(), batch_sizes=(1, 4), device="cpu")
    config = (model / "config.pbtxt").read_text()
    assert all(f'name: "{name}"' in config for name in NAMES)


class Awkward(Detector):
    """Outputs with the names of values inside the graph, and a tensor that is returned twice."""

    def forward(self, images: Tensor) -> dict[str, object]:
        found = super().forward(images)
        scores = found["scores"]
        return {"relu": found["boxes"], "conv2d": scores, "again": scores, "linear": found["found"]}


def test_names_of_inner_values_and_a_tensor_returned_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = load(Awkward().eval())
    details = export_onnx(network, tmp_path / "network.onnx", None)
    assert list(details["outputs"]) == ["relu", "conv2d", "again", "linear"]
    found = parity(network, open_runner("onnxruntime", path=tmp_path / "network.onnx", device=CPU))
    assert found.within, found.summary()


def test_an_output_with_the_name_of_the_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="its output 'images' has the name of an input"):
        export_onnx(load(Detector("images").eval()), tmp_path / "network.onnx", None)
