from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import litdeploy
from litdeploy.config.recipe import DataSettings
from litdeploy.config.target import Precision, Target, Tolerance, Tolerances
from litdeploy.errors import BundleError, DataError, ParityError, SettingsError
from litdeploy.exporter.formats import onnx as onnx_format
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.files import sha256_of
from litdeploy.networks import Network
from litdeploy.runtime.adapter import read_adapter
from litdeploy.runtime.engine import BatchProfile, read_engine
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Artefact

TARGET = Target(device="cpu", batch_sizes=(1, 16))
CAPABILITIES = ("8.6", "8.9", "12.0")
ABSENT = "there is no CUDA GPU here, and tensorrt builds only on the GPU that runs the engine"


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that makes a mistake: one weight of the file is not the network's."""

    def export_wrongly(network: Network, path: Path, opset: int | None, **options: Any) -> dict[str, object]:
        details = export_onnx(network, path, opset, **options)
        model = onnx.load_model(path)
        bias = next(each for each in model.graph.initializer if each.dims == [10])
        values = numpy_helper.to_array(bias) + np.eye(10, dtype=np.float32)[3]
        bias.CopyFrom(numpy_helper.from_array(values, bias.name))
        onnx.save_model(model, path)
        return details

    monkeypatch.setattr(onnx_format, "export_onnx", export_wrongly)


def test_the_artefact_is_in_the_manifest_with_what_was_measured(bundle: Bundle) -> None:
    manifest = litdeploy.export(bundle, target=TARGET)
    assert bundle.read() == manifest
    artefact = manifest.artefacts["onnx"]
    path = bundle.artefact_path(artefact)
    assert path == bundle.export_path / "student.onnx"
    assert artefact.precision == "fp32"
    assert set(artefact.versions) == {"torch", "onnx", "onnxruntime", "onnxscript"}
    assert artefact.details["bytes"] == path.stat().st_size
    assert artefact.details["input"] == "images"
    parity = artefact.details["parity"]
    assert parity["within"]
    assert [(each["batch_size"], each["images"]) for each in parity["batches"]] == [(1, 16), (16, 256)]
    assert parity["accuracy"]["reference"]["images"] == 359
    assert parity["tolerance"] == TARGET.tolerance.fp32.model_dump()
    assert artefact.details["command"].startswith("litdeploy export ")
    assert Artefact.model_validate_json((bundle.export_path / "student.onnx.json").read_bytes()) == artefact
    assert sorted(file.name for file in bundle.export_path.iterdir()) == ["student.onnx", "student.onnx.json"]


@pytest.mark.usefixtures("tampered")
def test_an_artefact_that_computes_something_else_is_rejected(bundle: Bundle) -> None:
    with pytest.raises(ParityError, match=r"batch 16: largest difference 1\.00e\+00 .* beyond the limit") as caught:
        litdeploy.export(bundle.path, target=TARGET)
    assert caught.value.exit_code == 3
    assert "limit: 0.0001 + 0.0001 of the largest logit" in str(caught.value)
    rejected = bundle.export_path / "student.onnx.rejected"
    assert str(rejected) in str(caught.value)
    sidecar = json.loads((bundle.export_path / "student.onnx.rejected.json").read_text())
    assert sidecar["path"] == "export/student.onnx.rejected"
    assert sidecar["sha256"] == sha256_of(rejected)
    assert not sidecar["details"]["parity"]["within"]
    assert len(list(bundle.export_path.iterdir())) == 2
    assert bundle.read().artefacts == {}


def test_a_rejection_leaves_the_artefact_of_before_and_a_success_clears_it_away(bundle: Bundle) -> None:
    before = litdeploy.export(bundle, target=TARGET)
    with pytest.raises(ParityError):
        litdeploy.export(bundle, target=Target(device="cpu", tolerance=Tolerances(fp32=Tolerance(atol=0, rtol=0))))
    assert bundle.read() == before
    assert bundle.artefact_path(before.artefacts["onnx"]).is_file()
    assert len(list(bundle.export_path.iterdir())) == 4
    litdeploy.export(bundle, target=TARGET)
    assert sorted(file.name for file in bundle.export_path.iterdir()) == ["student.onnx", "student.onnx.json"]


def test_the_target_says_the_operator_set_and_may_be_named(bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "edge.yaml"
    target.write_text("device: cpu\nopset: 18\nbatch_sizes: [4]\n")
    details = litdeploy.export(bundle, target=str(target)).artefacts["onnx"].details
    assert details["opset"] == 18
    assert [each["batch_size"] for each in details["parity"]["batches"]] == [4]


@pytest.mark.parametrize("data", ["digits", DataSettings(source="digits")])
def test_other_data_may_be_named(bundle: Bundle, data: DataSettings | str) -> None:
    manifest = bundle.read()
    recipe = manifest.recipe.model_copy(update={"data": DataSettings(source="/not/there")})
    bundle.write(manifest.model_copy(update={"recipe": recipe}))
    with pytest.raises(DataError):
        litdeploy.export(bundle, target=TARGET)
    assert "onnx" in litdeploy.export(bundle, target=TARGET, data=data).artefacts


def test_what_is_no_whole_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        litdeploy.export(tmp_path / "none")
    bundle.write(bundle.read().model_copy(update={"status": "interrupted"}))
    with pytest.raises(BundleError, match="interrupted"):
        litdeploy.export(bundle, target=TARGET)


def test_without_a_form_there_is_nothing_to_export(bundle: Bundle) -> None:
    with pytest.raises(SettingsError, match="nothing to export"):
        litdeploy.export(bundle, onnx=False)


def test_each_precision_is_a_file_of_its_own(bundle: Bundle) -> None:
    manifest = litdeploy.export(bundle, precisions=("fp32", "fp16", "bf16", "int8"), target=TARGET)
    assert {kind: artefact.path for kind, artefact in manifest.artefacts.items()} == {
        "onnx": "export/student.onnx",
        "onnx-fp16": "export/student.fp16.onnx",
        "onnx-bf16": "export/student.bf16.onnx",
        "onnx-int8": "export/student.int8.onnx",
    }
    for artefact in manifest.artefacts.values():
        bundle.artefact_path(artefact)
        assert artefact.details["parity"]["within"]
        assert artefact.details["parity"]["tolerance"] == getattr(TARGET.tolerance, artefact.precision).model_dump()
    half, int8 = manifest.artefacts["onnx-fp16"].details, manifest.artefacts["onnx-int8"].details
    assert half["largest_activation"]["value"] > 0
    assert half["kept_in_fp32"] == ["linear"]
    assert manifest.artefacts["onnx-bf16"].details["opset"] == 22
    assert int8["quantised"] == {"Conv": 7, "Add": 3, "Gemm": 1}
    assert int8["calibration"]["images"] == 512
    assert int8["latency"]["fp32_ms"] > 0 < int8["latency"]["int8_ms"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"precisions": ("bf16",), "target": TARGET.model_copy(update={"opset": 20})},
            SettingsError,
            "first that does",
        ),
        ({"precisions": ("int8",), "calibration_images": 5000}, DataError, "--calibration-images 1"),
    ],
)
def test_what_cannot_be_made_leaves_nothing(
    bundle: Bundle, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        litdeploy.export(bundle, **{"target": TARGET, **options})
    assert bundle.read().artefacts == {}
    assert not bundle.export_path.exists() or not list(bundle.export_path.iterdir())


def test_without_space_nothing_is_left(bundle: Bundle) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(BundleError, match=r"student.onnx: cannot be written \(File too large\)"):
            litdeploy.export(bundle, target=TARGET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(bundle.export_path.iterdir())


@pytest.mark.gpu
def test_for_a_gpu_it_is_verified_there(bundle: Bundle) -> None:
    parity = litdeploy.export(bundle, target="cuda").artefacts["onnx"].details["parity"]
    assert [each["batch_size"] for each in parity["batches"]] == [1, 8, 256]


@pytest.mark.tensorrt
def test_engines_are_built_ahead_of_time_and_not_run(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    told: list[str] = []
    target = TARGET.model_copy(update={"memory_limit": 0.5})
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")
    manifest = litdeploy.export(
        bundle,
        onnx=False,
        trt=True,
        precisions=precisions,
        compute_capabilities=CAPABILITIES,
        target=target,
        triton_repository=tmp_path / "models",
        progress=told.append,
    )
    assert list(manifest.artefacts) == ["trt", "trt-fp16", "trt-bf16", "trt-int8"]
    for precision, artefact in zip(precisions, manifest.artefacts.values(), strict=True):
        engine = read_engine(bundle.artefact_path(artefact))
        assert engine.artefact == artefact
        assert engine.details.compute_capabilities == CAPABILITIES
        assert engine.details.memory_limit == 2**29
        assert engine.details.batches == BatchProfile(min=1, opt=1, max=16)
        assert engine.details.precisions.weights[precision] > 0.5
        assert engine.details.bytes == len(engine.content)
        assert engine.details.command.endswith(f"--trt --precision {precision} --compute-capability 8.6,8.9,12.0")
        assert {"torch", "onnx", "tensorrt_rtx"} <= artefact.versions.keys()
        assert artefact.details["parity"] is None
        assert artefact.details["chosen"] == told[0]
    version = manifest.artefacts["trt"].versions["tensorrt_rtx"]
    assert told[0] == f"tensorrt_rtx {version} for compute capability 8.6, 8.9, 12.0: {ABSENT}"
    assert told[1].startswith(
        f"export/student.engine: left out of {tmp_path / 'models'}. Triton's TensorRT backend loads engines of"
    )
    assert (len(told), (tmp_path / "models").exists()) == (5, False)
    assert len(list(bundle.export_path.iterdir())) == 8


@pytest.mark.tensorrt
@pytest.mark.skipif(torch.cuda.is_available(), reason="engines are built for the GPU at hand, and run")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_for_a_target_elsewhere_takes_pixels(bundle: Bundle, precision: Precision) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    exported = litdeploy.export(
        bundle, onnx=False, trt=True, precisions=(precision,), embed_preprocessing=True, target="rtx4090"
    )
    [artefact] = exported.artefacts.values()
    details = read_engine(bundle.artefact_path(artefact)).details
    assert (details.input_type, details.input_shape) == ("uint8", ("batch", 8, 8, 1))
    assert details.compute_capabilities == ("8.9",)
    assert details.memory_limit == 20 * 2**30
    assert read_adapter(details.metadata).dtype is torch.uint8
    assert details.command.endswith("--embed-preprocessing --compute-capability 8.9 --target rtx4090")


def test_triton_gets_what_was_exported(bundle: Bundle, tmp_path: Path) -> None:
    told: list[str] = []
    options: dict[str, Any] = {"target": TARGET, "triton_repository": tmp_path / "models", "progress": told.append}
    litdeploy.export(bundle, precisions=("fp32", "fp16"), **options)
    models = tmp_path / "models"
    folders = [models / name for name in ("student-onnx", "student.fp16-onnx")]
    assert sorted(models.iterdir()) == folders
    for folder in folders:
        assert sorted(each.name for each in folder.iterdir()) == ["1", "config.pbtxt", "labels.txt"]
        assert (folder / "labels.txt").read_text().split() == list("0123456789")
        assert "KIND_CPU" in (folder / "config.pbtxt").read_text()
    assert told == [f"{folder}: a model for tritonserver --model-repository {models}" for folder in folders]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": ("fp8",)}, "--precision fp8: no such precision"),
        ({"precisions": ()}, "no precision was given"),
        ({"precisions": ("fp32", "bf16"), "target": "t4"}, r"t4 \(compute capability 7.5\) lacks it"),
        ({"aoti": True, "precisions": ("int8",)}, "--aoti has no int8; it has fp32, fp16, bf16"),
        ({"io_precision": "int8"}, "--io-precision int8"),
        ({"compute_capabilities": ("8.6",)}, "--compute-capability is for TensorRT, .*Add --trt"),
        ({"version_compatible": True}, "--version-compatible is for TensorRT"),
        ({"hardware_compatibility": "ampere-plus"}, "--hardware-compatibility is for TensorRT"),
        ({"hardware_compatibility": "all"}, "Write none, ampere-plus, same-compute-capability"),
    ],
)
def test_what_cannot_be_had_is_refused(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        litdeploy.export(bundle, **{"target": Target(device="cpu", batch_sizes=(1, 16)), **options})
    assert bundle.read().artefacts == {}
    assert not bundle.export_path.exists() or not list(bundle.export_path.iterdir())
