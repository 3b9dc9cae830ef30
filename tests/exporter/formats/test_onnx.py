from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from litdeploy.config.target import Precision
from litdeploy.data import normalise
from litdeploy.errors import NetworkError, RunnerError, SettingsError
from litdeploy.exporter.formats.onnx import export_onnx, interleaved_ms
from litdeploy.exporter.precision import convert
from litdeploy.networks import Network
from litdeploy.runtime import open_runner
from litdeploy.runtime.onnx_file import describe_onnx

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(student: Network, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    path = tmp_path_factory.mktemp("export") / "new" / "student.onnx"
    return path, export_onnx(student, path, None)


def test_the_details_are_those_of_the_file(exported: tuple[Path, dict[str, object]]) -> None:
    path, details = exported
    model = onnx.load_model(path)
    assert details == {
        "opset": model.opset_import[0].version,
        "input": "images",
        "output": "logits",
        "input_shape": ["batch", 1, 8, 8],
        "output_shape": ["batch", 10],
        "outputs": {"logits": ["batch", 10]},
        "inputs": {"images": ["batch", 1, 8, 8]},
        "nodes": len(model.graph.node),
        "unfolded_batch_norms": 0,
        "bytes": path.stat().st_size,
    }
    assert [file.name for file in path.parent.iterdir()] == ["student.onnx"]


def test_batch_norms_are_in_the_convolutions(exported: tuple[Path, dict[str, object]], student: Network) -> None:
    operators = Counter(node.op_type for node in onnx.load_model(exported[0]).graph.node)
    assert operators["Conv"] == sum(isinstance(module, nn.Conv2d) for module in student.module.modules()) == 7
    assert operators["BatchNormalization"] == 0


def test_it_says_what_it_takes_and_nothing_of_where_it_was_made(exported: tuple[Path, dict[str, object]]) -> None:
    path, _ = exported
    properties = {each.key: each.value for each in onnx.load_model(path).metadata_props}
    assert json.loads(properties["mean"]) == [0.5]
    assert json.loads(properties["std"]) == [0.5]
    assert json.loads(properties["input_shape"]) == [1, 8, 8]
    assert json.loads(properties["classes"]) == list("0123456789")
    assert properties["litdeploy"]
    content = path.read_bytes()
    assert b".py" not in content
    assert str(Path.cwd()).encode() not in content


def test_a_file_is_described_as_it_was_written(exported: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path, details = exported
    described = describe_onnx(path)
    assert json.loads(described.pop("metadata")["mean"]) == [0.5]
    assert described.items() <= details.items()
    for content in (b"", b"not a model"):
        (tmp_path / "broken.onnx").write_bytes(content)
        with pytest.raises(RunnerError, match="not an ONNX file"):
            describe_onnx(tmp_path / "broken.onnx")


def test_an_operator_set_that_was_asked_for_is_in_the_file(student: Network, tmp_path: Path) -> None:
    details = export_onnx(student, tmp_path / "student.onnx", 18)
    assert details["opset"] == onnx.load_model(tmp_path / "student.onnx").opset_import[0].version == 18


def test_an_operator_set_that_cannot_be_had_is_refused(
    student: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SettingsError, match="opset 99: resnet cannot be written in this ONNX operator set"):
        export_onnx(student, tmp_path / "student.onnx", 99)
    assert not list(tmp_path.iterdir())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_network_is_left_as_it_was(student: Network, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in student.module.state_dict().items()}
    student.module.train()
    try:
        export_onnx(student, tmp_path / "student.onnx", None)
        assert student.module.training
    finally:
        student.module.eval()
    torch.testing.assert_close(student.module.state_dict(), before, atol=0, rtol=0)


class GivesAnObject(nn.Module):
    """As Hugging Face's classifiers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.module(images))


class BranchesOnPixels(GivesAnObject):
    def forward(self, images: Tensor) -> Tensor:
        if images.sum() > 0:
            images = -images
        return self.module(images)


class FixesTheBatch(GivesAnObject):
    def forward(self, images: Tensor) -> Tensor:
        return self.module(images.reshape(2, 1, 8, 8))


def test_a_network_that_gives_an_object_gives_its_logits(student: Network, tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    details = export_onnx(Network(GivesAnObject(student.module), student.spec, "object"), path, None)
    assert (details["input"], details["output"], details["unfolded_batch_norms"]) == ("images", "logits", 0)
    batch = student.example(3)
    with open_runner("onnxruntime", path=path, device=CPU) as runner:
        torch.testing.assert_close(runner.run(batch), student.module(batch).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrapper", [BranchesOnPixels, FixesTheBatch])
def test_a_network_that_cannot_be_exported_says_why(
    student: Network, tmp_path: Path, wrapper: type[GivesAnObject], capfd: pytest.CaptureFixture[str]
) -> None:
    network = Network(wrapper(student.module), student.spec, "mine.py")
    with pytest.raises(NetworkError, match=r"mine.py: PyTorch cannot export resnet to ONNX for any batch size: \w"):
        export_onnx(network, tmp_path / "student.onnx", None)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


class NormalisesTwice(nn.Module):
    """Its convolution's output is needed as it is, too: the batch norm cannot go into the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 8)
        self.norm = nn.BatchNorm2d(10)

    def forward(self, images: Tensor) -> Tensor:
        convolved = self.conv(images)
        logits: Tensor = (self.norm(convolved) + convolved).flatten(1)
        return logits


def test_a_batch_norm_that_is_left_is_counted(student: Network, tmp_path: Path) -> None:
    network = Network(NormalisesTwice().eval(), student.spec, "twice")
    assert export_onnx(network, tmp_path / "twice.onnx", None)["unfolded_batch_norms"] == 1


def test_weights_beyond_one_file_are_refused(student: Network, tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(2**15, 2**15)
    with pytest.raises(NetworkError, match=r"its weights take 4\.0 GiB"):
        export_onnx(Network(module, student.spec, "large"), tmp_path / "large.onnx", None)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("io_precision", ["fp32", "fp16", "bf16"])
def test_the_ends_are_in_the_type_that_was_asked_for(
    student: Network, tmp_path: Path, precision: Precision, io_precision: Precision
) -> None:
    path = tmp_path / "student.onnx"
    batch = student.example(8)
    conversion = None if precision == "fp32" else convert(student, precision, [batch])
    export_onnx(student, path, None, conversion=conversion, io_precision=io_precision)
    graph = onnx.load_model(path).graph
    kind = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[io_precision]
    assert [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)] == [kind, kind]
    if io_precision == "bf16" != precision:
        return  # onnxruntime has no kernels for it on a processor
    with open_runner("onnxruntime", path=path, device=CPU) as runner:
        found = runner.run(batch)
        assert runner.describe().precision == precision
    with torch.no_grad():
        expected = student.module(batch)
    limit = 1e-4 if precision == io_precision == "fp32" else 0.03
    assert (found - expected).abs().max() < limit * expected.abs().max()


def test_a_file_that_takes_pixels_normalises_them_as_the_data_does(student: Network, tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    details = export_onnx(student, path, None, embedded=True)
    assert details["input_shape"] == ["batch", 8, 8, 1]
    # TensorRT does nothing else with uint8.
    [first] = [node for node in onnx.load_model(path).graph.node if "images" in node.input]
    assert first.op_type == "Cast"
    pixels_NCHW = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = normalise(pixels_NCHW, student.spec.input)
    with torch.no_grad():
        expected = student.module(batch)
    with open_runner("onnxruntime", path=path, device=CPU) as runner:
        torch.testing.assert_close(runner.run(batch), expected, atol=1e-4, rtol=1e-4)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {"images": pixels_NCHW.permute(0, 2, 3, 1).numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)


def test_nodes_are_named_for_the_layers(exported: tuple[Path, dict[str, object]], student: Network) -> None:
    names = [node.name for node in onnx.load_model(exported[0]).graph.node]
    assert len(set(names)) == len(names)
    layers = {name.partition("/")[0] for name in names}
    assert layers <= {name for name, _ in student.module.named_modules()}
    assert {"layer1.0", "layer3.0.conv2", "linear"} <= layers


def test_both_are_called_in_turn_and_as_often(student: Network, tmp_path: Path) -> None:
    calls: list[str] = []
    with open_runner("eager", network=student, device=torch.device("cpu")) as runner:

        class Noted:
            name, device = runner.name, runner.device
            describe, __enter__, __exit__ = runner.describe, runner.__enter__, runner.__exit__

            def __init__(self, name: str) -> None:
                self.called = name

            def run(self, batch_NCHW: torch.Tensor) -> torch.Tensor:
                calls.append(self.called)
                return runner.run(batch_NCHW)

        times = interleaved_ms(Noted("a"), Noted("b"), student.example(1))
    assert min(times) > 0
    timed = calls[10:]
    assert timed == ["a", "b"] * (len(timed) // 2)
