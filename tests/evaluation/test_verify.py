"""The demo's way in small: a bundle whose teacher is there, exported, verified, tampered with."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from litdeploy.config.target import Target
from litdeploy.errors import BundleError
from litdeploy.evaluation.verify import verify
from litdeploy.exporter import export
from litdeploy.files import sha256_of
from litdeploy.networks import Network, new
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.storage.records import TeacherRecord
from litdeploy.storage.staging import sidecar_of
from tests.exporter.conftest import bundle_of

TARGET = Target(device="cpu", batch_sizes=(1, 16))


@pytest.fixture(scope="module")
def once(student: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and a bundle of a student that was exported. Nothing is written into it."""
    place = tmp_path_factory.mktemp("once")
    made = new("resnet,depth=14,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=1)
    path = place / "teacher.safetensors"
    spec = made.spec.with_(classes=tuple("0123456789"))
    sha256 = write_checkpoint(path, made.module.state_dict(), spec)
    bundle = bundle_of(student, place / "deploy")
    teacher = TeacherRecord(path=str(path), sha256=sha256, spec=spec)
    bundle.write(bundle.read().model_copy(update={"teacher": teacher}))
    export(bundle, precisions=("fp32", "fp16"), target=TARGET)
    return place


@pytest.fixture
def exported(once: Path, tmp_path: Path) -> Bundle:
    """A copy, with a teacher of its own."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    bundle = Bundle(tmp_path / "deploy")
    manifest = bundle.read()
    teacher = manifest.teacher.model_copy(update={"path": str(tmp_path / "teacher.safetensors")})
    bundle.write(manifest.model_copy(update={"teacher": teacher}))
    return bundle


def _tamper(bundle: Bundle, kind: str, value: float) -> None:
    """Changes a weight of the second section in the exported file, and lets the manifest know its new hash."""
    artefact = bundle.read().artefacts[kind]
    path = bundle.path / artefact.path
    model = onnx.load_model(path)
    node = next(node for node in model.graph.node if node.name.startswith("layer2.0.conv1/Conv"))
    weight = next(each for each in model.graph.initializer if each.name == node.input[1])
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = value
    weight.CopyFrom(numpy_helper.from_array(values.astype(values.dtype), weight.name))
    onnx.save_model(model, path)
    bundle.add_artefact(kind, artefact.model_copy(update={"sha256": sha256_of(path)}))


def test_compression_and_conversion_are_told_apart(exported: Bundle) -> None:
    lines: list[str] = []
    found = verify(exported, target=TARGET, bisect=True, progress=lines.append)
    assert lines == ["student", "teacher", "onnx", "onnx-fp16"]
    assert found.within
    assert found.partings == {}
    compression, fp32, fp16 = found.differences
    assert (compression.error, compression.reference, compression.candidate) == ("compression", "teacher", "student")
    assert compression.parity is None
    assert [(each.error, each.candidate, each.precision) for each in (fp32, fp16)] == [
        ("conversion", "onnx", "fp32"),
        ("conversion", "onnx-fp16", "fp16"),
    ]
    assert None not in (compression.max_absolute, fp32.max_absolute, fp16.max_absolute)
    assert 0 < (fp32.max_absolute or 0) < (fp16.max_absolute or 0) < (compression.max_absolute or 0)
    assert fp32.top1 == 1 > compression.top1
    for each in found.differences:
        assert each.reference_accuracy.images == each.candidate_accuracy.images == 359
    assert compression.candidate_accuracy == fp16.reference_accuracy
    assert fp16.parity is not None
    assert [batch.batch_size for batch in fp16.parity.batches] == [1, 16]


def test_what_is_beyond_the_tolerance_is_set_aside_and_bisected(exported: Bundle) -> None:
    _tamper(exported, "onnx-fp16", 10.0)
    path = exported.export_path / "student.fp16.onnx"
    found = verify(exported, target=TARGET, bisect=True)
    assert not found.within
    assert found.rejected == {"onnx-fp16": f"{path}.rejected"}
    assert set(exported.read().artefacts) == {"onnx"}
    assert not path.exists()
    assert not sidecar_of(path).exists()
    [parting] = found.partings.values()
    assert parting is not None
    assert parting.layer == "layer2.0.conv1"
    assert parting.max_relative is not None
    assert parting.max_relative > 0.1
    assert parting.compared > 3

    # It stays where it is, and can be bisected again.
    again = verify(exported, target=TARGET, bisect=True)
    assert again.within
    assert again.partings == found.partings


def test_values_that_are_not_finite_are_set_aside(exported: Bundle) -> None:
    _tamper(exported, "onnx", math.nan)
    found = verify(exported, target=TARGET, artefacts=["onnx"], bisect=True)
    assert found.differences[-1].max_absolute is None
    parting = found.partings["student.onnx.rejected"]
    assert parting is not None
    assert (parting.layer, parting.max_absolute) == ("layer2.0.conv1", None)


def test_one_artefact_and_no_teacher(exported: Bundle) -> None:
    Path(exported.read().teacher.path).unlink()
    lines: list[str] = []
    found = verify(exported.path, artefacts=["onnx-fp16"], target=TARGET, progress=lines.append)
    assert [each.candidate for each in found.differences] == ["onnx-fp16"]
    assert any("--teacher FILE" in line for line in lines)


def test_what_is_not_there_or_altered_is_refused(exported: Bundle) -> None:
    with pytest.raises(BundleError, match=r"--artefact onnx-int8: .* It has onnx, onnx-fp16"):
        verify(exported, artefacts=["onnx-int8"], target=TARGET)
    path = exported.export_path / "student.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BundleError, match="altered since it was exported"):
        verify(exported, target=TARGET)
    exported.write(exported.read().model_copy(update={"artefacts": {}}))
    with pytest.raises(BundleError, match="has no exported student"):
        verify(exported, target=TARGET)


def test_a_rejected_file_without_its_sidecar_is_named(exported: Bundle) -> None:
    (exported.export_path / "student.bf16.onnx.rejected").write_bytes(b"")
    with pytest.raises(BundleError, match=r"student.bf16.onnx.rejected.json: missing or damaged"):
        verify(exported, target=TARGET, bisect=True)


def test_numbers_survive_json(exported: Bundle) -> None:
    found = verify(exported, target=TARGET, artefacts=["onnx"])
    assert type(found).model_validate_json(found.model_dump_json()) == found
    assert np.isfinite(found.differences[-1].top1)
