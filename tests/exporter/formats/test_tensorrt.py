from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from litdeploy.config.spec import InputSpec, NetworkSpec, TranslationInput
from litdeploy.errors import BundleError, DependencyError, GateError, RunnerError, SettingsError
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.formats.tensorrt import (
    Builder,
    EngineOptions,
    build_engine,
    choose_library,
    rtx_capabilities,
    versions,
)
from litdeploy.files import sha256_of
from litdeploy.networks import Network
from litdeploy.networks.families.stargan import stargan
from litdeploy.runtime.engine import BatchProfile, EngineDetails, read_engine
from litdeploy.storage.records import Artefact

pytestmark = pytest.mark.tensorrt

CAPABILITIES = ("8.6", "8.9", "12.0")
BATCHES = BatchProfile(min=1, opt=8, max=64)


class Half(nn.Module):
    """A module in float16 whose input and output stay float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).half()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images.half())
        return logits.float()


class Images:
    """Calibration images, as onnxruntime's quantiser reads them."""

    def __init__(self, network: Network) -> None:
        self.batches = iter([{"images": network.example(16).numpy()}] * 2)

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def quantise(network: Network, source: Path, path: Path, float_bias: bool) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    logging.disable(logging.WARNING)  # of steps that an exported file does not need
    try:
        quantize_static(
            source,
            path,
            Images(network),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "Add"],
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": not float_bias},
        )
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def files(student: Network, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The student in each precision."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    folder = tmp_path_factory.mktemp("onnx")
    paths = {name: folder / f"{name}.onnx" for name in ("fp32", "fp16", "int8", "int8-bias")}
    export_onnx(student, paths["fp32"], None)
    export_onnx(Network(Half(student.module).eval(), student.spec, "half"), paths["fp16"], None)
    quantise(student, paths["fp32"], paths["int8"], float_bias=True)
    quantise(student, paths["fp32"], paths["int8-bias"], float_bias=False)
    return paths


@pytest.fixture(scope="module")
def choice(files: dict[str, Path]) -> Builder:
    return choose_library(torch.device("cpu"), CAPABILITIES)


@pytest.fixture(autouse=True)
def _nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_for_three_architectures_is_built_in_each_precision(
    files: dict[str, Path], choice: Builder, tmp_path: Path, precision: str
) -> None:
    path = tmp_path / "new" / "student.engine"
    options = EngineOptions(precision, BATCHES, memory_limit=2**28, command="litdeploy export deploy --trt")
    artefact = build_engine(files[precision], path, choice, options)
    assert sorted(file.name for file in path.parent.iterdir()) == ["student.engine", "student.engine.json"]
    engine = read_engine(path)
    assert engine.artefact == artefact
    assert artefact.sha256 == hashlib.sha256(engine.content).hexdigest()
    assert artefact.precision == precision
    assert artefact.versions["tensorrt_rtx"] == choice.version
    assert artefact.versions["cuda"]
    details = engine.details
    assert details.precisions == EngineDetails.model_validate(artefact.details).precisions
    assert details.precisions.weights[precision] > 0.9
    assert details.precisions.layers[precision] > 0.5
    assert details.precisions.source == "network"
    assert details.model_dump(exclude={"precisions", "metadata"}) == {
        "library": "tensorrt_rtx",
        "gpu": None,
        "compute_capabilities": CAPABILITIES,
        "version_compatible": False,
        "hardware_compatibility": "none",
        "batches": {"min": 1, "opt": 8, "max": 64},
        "input": "images",
        "output": "logits",
        "inputs": {"images": ("batch", 1, 8, 8)},
        "input_shape": ("batch", 1, 8, 8),
        "output_shape": ("batch", 10),
        "input_type": "float32",
        "output_type": "float32",
        "outputs": {"logits": ("batch", 10)},
        "output_types": {"logits": "float32"},
        "onnx_sha256": sha256_of(files[precision]),
        "command": "litdeploy export deploy --trt",
        "memory_limit": 2**28,
        "timing_cache": None,
        "bytes": path.stat().st_size,
    }
    assert json.loads(details.metadata["classes"]) == list("0123456789")
    for capability in CAPABILITIES:
        engine.check(choice.version, capability)
    with pytest.raises(RunnerError, match=r"compute capability 8\.6, 8\.9, 12\.0, but this GPU has 9\.0"):
        engine.check(choice.version, "9.0")


def test_an_engine_takes_images_and_domains_and_gives_images(choice: Builder, tmp_path: Path) -> None:
    spec = TranslationInput(images=InputSpec(shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3), domains=2)
    network = Network(stargan(blocks=2, domains=2, width=2).eval(), NetworkSpec(name="stargan", input=spec), "G.ckpt")
    export_onnx(network, tmp_path / "G.onnx", None)
    build_engine(tmp_path / "G.onnx", tmp_path / "G.engine", choice, EngineOptions("fp32", BATCHES))
    details = read_engine(tmp_path / "G.engine").details
    assert details.inputs == {"images": ("batch", 3, 8, 8), "domains": ("batch", 2)}
    assert (details.output, details.output_shape) == ("translated", ("batch", 3, 8, 8))


def test_the_type_of_input_and_output_is_told(
    student: Network, files: dict[str, Path], choice: Builder, tmp_path: Path
) -> None:
    model = onnx.load_model(files["fp16"])
    [first], [last] = (
        [node for node in model.graph.node if node.op_type == "Cast" and port in names(node)]
        for port in ("images", "logits")
    )
    for node, value, kept in (
        (first, model.graph.input[0], first.output[0]),
        (last, model.graph.output[0], last.input[0]),
    ):
        model.graph.node.remove(node)
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
        value.name = kept
    path = tmp_path / "half.onnx"
    onnx.save_model(model, path)
    artefact = build_engine(path, tmp_path / "half.engine", choice, EngineOptions("fp16", BATCHES))
    assert (artefact.details["input_type"], artefact.details["output_type"]) == ("float16", "float16")


def names(node: onnx.NodeProto) -> list[str]:
    return [*node.input, *node.output]


@pytest.mark.parametrize(
    ("file", "precision"), [("fp32", "fp16"), ("fp32", "int8"), ("fp16", "fp32"), ("int8", "fp16")]
)
def test_a_file_in_another_precision_than_asked_for_fails(
    files: dict[str, Path], choice: Builder, tmp_path: Path, file: str, precision: str
) -> None:
    with pytest.raises(GateError, match=rf"{precision} was requested, and only 0% of the \w+ would be") as caught:
        build_engine(files[file], tmp_path / "student.engine", choice, EngineOptions(precision, BATCHES))
    assert caught.value.exit_code == 3
    assert str(caught.value).endswith(f"litdeploy export --onnx --precision {precision}")
    assert not list(tmp_path.iterdir())


def test_what_the_parser_refuses_is_told_whole(files: dict[str, Path], choice: Builder, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="does not take it") as caught:
        build_engine(files["int8-bias"], tmp_path / "student.engine", choice, EngineOptions("int8", BATCHES))
    told = str(caught.value)
    assert re.search(r"DequantizeLinear '\S*conv1\S*bias\S*': Invalid Node", told), told
    assert "input has type Int32 but must have type" in told
    assert "cudaError" not in told
    assert "biases stay in floating point" in told
    assert told.endswith("litdeploy export --onnx --precision int8")


def classifier(path: Path, nodes: list[Any], weights: list[Any], shape: list[int | str]) -> Path:
    """An ONNX file from images to ten logits."""
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [shape[0], 10])],
        weights,
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_what_the_builder_refuses_is_told_whole(choice: Builder, tmp_path: Path) -> None:
    """Weights that pass through another operation on their way from int8."""
    weights = [
        numpy_helper.from_array(np.ones((10, 64), dtype=np.int8), "weights"),
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
    ]
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("QuantizeLinear", ["flat", "scale", "zero"], ["quantised"]),
        helper.make_node("DequantizeLinear", ["quantised", "scale", "zero"], ["values"]),
        helper.make_node("Transpose", ["weights"], ["turned"], perm=[1, 0]),
        helper.make_node("DequantizeLinear", ["turned", "scale", "zero"], ["factors"]),
        helper.make_node("MatMul", ["values", "factors"], ["logits"]),
    ]
    path = classifier(tmp_path / "turned.onnx", nodes, weights, ["batch", 1, 8, 8])
    with pytest.raises(RunnerError, match=r"does not build it:\n.*Quantized constant \(weights\) is only allowed"):
        build_engine(path, tmp_path / "turned.engine", choice, EngineOptions("int8", BATCHES))
    assert [file.name for file in tmp_path.iterdir()] == ["turned.onnx"]


def test_an_operator_that_is_not_known_is_named(choice: Builder, tmp_path: Path) -> None:
    node = helper.make_node("NoSuchOperator", ["images"], ["logits"], domain="mine")
    path = classifier(tmp_path / "own.onnx", [node], [], ["batch", 1, 8, 8])
    with pytest.raises(RunnerError, match="NoSuchOperator") as caught:
        build_engine(path, tmp_path / "own.engine", choice, EngineOptions("fp32", BATCHES))
    assert "or leave --trt out" in str(caught.value)


def test_a_truncated_file_is_refused(files: dict[str, Path], choice: Builder, tmp_path: Path) -> None:
    path = tmp_path / "short.onnx"
    path.write_bytes(files["fp32"].read_bytes()[:-1000])
    with pytest.raises(RunnerError, match="not an ONNX file"):
        build_engine(path, tmp_path / "short.engine", choice, EngineOptions("fp32", BATCHES))
    with pytest.raises(RunnerError, match="no such file"):
        build_engine(tmp_path / "none.onnx", tmp_path / "none.engine", choice, EngineOptions("fp32", BATCHES))


@pytest.mark.parametrize("shape", [["batch", 64], ["batch", 1, "height", 8]])
def test_a_file_that_takes_no_images_of_one_size_is_refused(
    choice: Builder, tmp_path: Path, shape: list[int | str]
) -> None:
    path = classifier(tmp_path / "other.onnx", [helper.make_node("Flatten", ["images"], ["logits"])], [], shape)
    with pytest.raises(RunnerError, match="images of one size, in batches, are needed"):
        build_engine(path, tmp_path / "other.engine", choice, EngineOptions("fp32", BATCHES))


def test_a_file_for_one_batch_size_is_built_for_that_only(choice: Builder, tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.ones((64, 10), dtype=np.float32), "weights")]
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    path = classifier(tmp_path / "fixed.onnx", nodes, weights, [4, 1, 8, 8])
    with pytest.raises(SettingsError, match=r"takes batches of 4 only.*`batch_sizes` to \[4\]"):
        build_engine(path, tmp_path / "fixed.engine", choice, EngineOptions("fp32", BATCHES))
    artefact = build_engine(path, tmp_path / "fixed.engine", choice, EngineOptions("fp32", BatchProfile.of((4,))))
    assert artefact.details["batches"] == {"min": 4, "opt": 4, "max": 4}


def test_pixels_that_are_cast_before_all_else_are_taken(choice: Builder, tmp_path: Path) -> None:
    """TensorRT computes nothing in uint8, and does not transpose it either."""
    weights = [numpy_helper.from_array(np.ones((64, 10), dtype=np.float32), "weights")]
    nodes = [
        helper.make_node("Cast", ["images"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["values"], ["turned"], perm=[0, 3, 1, 2]),
        helper.make_node("Flatten", ["turned"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    path = classifier(tmp_path / "pixels.onnx", nodes, weights, ["batch", 8, 8, 1])
    model = onnx.load_model(path)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    onnx.save_model(model, path)
    artefact = build_engine(path, tmp_path / "pixels.engine", choice, EngineOptions("fp32", BATCHES))
    assert (artefact.details["input_type"], artefact.details["input_shape"]) == ("uint8", ["batch", 8, 8, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version_compatible": True}, "--version-compatible: tensorrt_rtx does not have it"),
        (
            {"hardware_compatibility": "ampere-plus"},
            r"--hardware-compatibility ampere-plus: .* --compute-capability 8\.6",
        ),
    ],
)
def test_what_tensorrt_rtx_does_not_have_is_refused(
    files: dict[str, Path], choice: Builder, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        build_engine(files["fp32"], tmp_path / "student.engine", choice, EngineOptions("fp32", BATCHES, **changes))


def test_an_engine_that_cannot_be_written_leaves_nothing(
    files: dict[str, Path], choice: Builder, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"cannot be written \(.*\); [\d,]+ bytes are needed"):
        build_engine(files["fp32"], tmp_path / "file" / "student.engine", choice, EngineOptions("fp32", BATCHES))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_sidecar_is_an_artefact_as_every_other(files: dict[str, Path], choice: Builder, tmp_path: Path) -> None:
    path = tmp_path / "student.engine"
    built = build_engine(files["fp32"], path, choice, EngineOptions("fp32", BATCHES))
    written = (tmp_path / "student.engine.json").read_text()
    assert Artefact.model_validate_json(written) == built
    assert json.loads(written)["path"] == "student.engine"


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def stands_in(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__version__ = "10.9.0.34"
    return module


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's answers on a machine with an A10."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture
def no_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", stands_in("tensorrt"))


@pytest.mark.usefixtures("rtx")
def test_without_a_gpu_tensorrt_rtx_builds_for_what_is_named() -> None:
    choice = choose_library(CPU, ("8.6", "12.0", "8.6"))
    assert (choice.library, choice.compute_capabilities, choice.gpu) == ("tensorrt_rtx", ("8.6", "12.0"), None)
    assert choice.summary() == (
        f"tensorrt_rtx {choice.version} for compute capability 8.6, 12.0: there is no CUDA GPU here, and tensorrt "
        "builds only on the GPU that runs the engine"
    )
    found = versions(choice)
    assert found["tensorrt_rtx"] == choice.version
    assert found["cuda"].isdecimal()
    assert "driver" not in found


@pytest.mark.usefixtures("rtx")
def test_without_a_gpu_one_must_be_named() -> None:
    with pytest.raises(SettingsError, match=r"Name them: litdeploy export --trt --compute-capability 8\.6,8\.9,12\.0"):
        choose_library(CPU)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("asked", ["9.0", "86", "sm_86", ""])
def test_a_capability_that_tensorrt_rtx_does_not_build_for_is_refused(asked: str) -> None:
    with pytest.raises(SettingsError, match=r"does not build for it; it builds for .*8\.6, 8\.9, 12\.0") as caught:
        choose_library(CPU, ("8.6", asked))
    assert "https://pypi.nvidia.com" in str(caught.value)


@pytest.mark.usefixtures("rtx")
def test_the_capabilities_that_tensorrt_rtx_builds_for() -> None:
    known = rtx_capabilities()
    assert {"7.5", "8.6", "8.9", "12.0"} <= known.keys()
    assert known["12.0"].name == "SM120"


@pytest.mark.usefixtures("gpu", "tensorrt")
@pytest.mark.parametrize("asked", [(), ("8.6",)])
def test_where_the_library_and_its_gpu_are_tensorrt_builds(asked: tuple[str, ...]) -> None:
    choice = choose_library(CUDA, asked)
    assert (choice.library, choice.version, choice.gpu) == ("tensorrt", "10.9.0.34", "NVIDIA A10")
    assert choice.compute_capabilities == ("8.6",)
    assert choice.reason == "the library and a GPU (NVIDIA A10) are here"


@pytest.mark.usefixtures("rtx", "gpu", "tensorrt")
def test_for_another_gpu_than_the_one_at_hand_tensorrt_rtx_builds() -> None:
    choice = choose_library(CUDA, ("8.6", "8.9"))
    assert (choice.library, choice.compute_capabilities, choice.gpu) == ("tensorrt_rtx", ("8.6", "8.9"), None)
    assert choice.reason == "tensorrt builds only for the GPU at hand, of compute capability 8.6"


@pytest.mark.usefixtures("rtx", "gpu", "no_tensorrt")
def test_without_tensorrt_its_rtx_builds_for_the_gpu_at_hand() -> None:
    choice = choose_library(CUDA)
    assert (choice.library, choice.compute_capabilities, choice.gpu) == ("tensorrt_rtx", ("8.6",), "NVIDIA A10")
    assert choice.reason == "tensorrt is not installed"


@pytest.mark.usefixtures("no_tensorrt", "no_rtx")
def test_without_either_library_it_says_what_to_install_and_from_where(gpu: None) -> None:
    with pytest.raises(DependencyError, match=r"there is no CUDA GPU here.*tensorrt_rtx is unavailable") as caught:
        choose_library(CPU, ("8.6",))
    assert str(caught.value).endswith("Install one: pip install tensorrt-rtx")
    with pytest.raises(DependencyError, match="tensorrt is not installed") as caught:
        choose_library(CUDA)
    assert str(caught.value).endswith("pip install tensorrt --extra-index-url https://pypi.nvidia.com")
