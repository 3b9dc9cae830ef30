"""Export of networks that nobody compressed: the same formats, precisions, gate and sidecars as a bundle's."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import litdeploy
from litdeploy.config.spec import InputSpec
from litdeploy.config.target import Target
from litdeploy.errors import BundleError, DataError, SettingsError
from litdeploy.networks import load, new
from litdeploy.storage.bundle import TOKENIZER, Bundle, carried_by, read_sidecar
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.storage.exports import ExportFolder
from litdeploy.storage.records import Exports, Parity

TARGET = Target(device="cpu", batch_sizes=(1, 8))


class Small(nn.Module):
    """A network of the user's, whose constructor takes an argument."""

    input_spec = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.5,))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(images)
        return logits


def parity_of(exports: Exports, kind: str) -> Parity:
    return Parity.model_validate(exports.artefacts[kind].details["parity"])


def test_weights_are_exported_and_verified(teacher_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    exports = litdeploy.export(
        teacher_path,
        out=out,
        precisions=("fp32", "int8"),
        data="digits",
        calibration_images=64,
        # The teacher is untrained: its classes are all but equal.
        target=TARGET.model_copy(update={"tolerance": _loose()}),
    )
    assert isinstance(exports, Exports)
    assert list(exports.artefacts) == ["onnx", "onnx-int8"]
    assert ExportFolder(out).read() == exports
    for kind, name in (("onnx", "network.onnx"), ("onnx-int8", "network.int8.onnx")):
        artefact = exports.artefacts[kind]
        assert read_sidecar(out / name) == artefact
        accuracy = parity_of(exports, kind).accuracy
        assert accuracy is not None
        assert accuracy.reference.images == 359
    assert exports.artefacts["onnx"].command == (
        f"litdeploy export {teacher_path} --out {out} --data digits --onnx --precision fp32"
    )
    assert exports.artefacts["onnx-int8"].details["quantised"]
    score = litdeploy.evaluate(out / "network.int8.onnx", data="digits")
    assert score.images == 359

    found = litdeploy.verify(out, target=TARGET, artefacts=["onnx"])
    [difference] = found.differences
    assert (difference.reference, difference.candidate) == ("network", "onnx")
    assert difference.candidate_accuracy is not None
    assert difference.candidate_accuracy.images == 359
    assert found.within


def _loose() -> object:
    tolerances = TARGET.tolerance
    loose = {name: getattr(tolerances, name).model_copy(update={"top1": 0, "accuracy": 1}) for name in ("int8",)}
    return tolerances.model_copy(update=loose)


def test_without_data_fp32_is_compared_on_noise_and_other_precisions_are_refused(
    teacher_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    with pytest.raises(DataError, match=r"which every precision but fp32 needs.*--data"):
        litdeploy.export(teacher_path, out=out, precisions=("fp32", "int8"), target=TARGET)
    assert not list(out.glob("network*"))
    exports = litdeploy.export(teacher_path, out=out, target=TARGET)
    assert isinstance(exports, Exports)
    parity = parity_of(exports, "onnx")
    assert parity.within
    assert parity.accuracy is None
    assert [batch.images for batch in parity.batches] == [16, 64]
    assert litdeploy.verify(out, target=TARGET).within


def test_a_file_is_verified_against_any_network(teacher_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    litdeploy.export(teacher_path, out=out, target=TARGET)
    path = out / "network.onnx"
    with pytest.raises(SettingsError, match=r"--against teacher\.pt"):
        litdeploy.verify(path, target=TARGET)
    assert litdeploy.verify(path, against=teacher_path, target=TARGET).within

    other = new("resnet14,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=4)
    write_checkpoint(tmp_path / "other.safetensors", other.module.state_dict(), other.spec)
    found = litdeploy.verify(path, against=tmp_path / "other.safetensors", target=TARGET, bisect=True)
    assert not found.within
    assert list(found.beyond) == ["network.onnx"]
    assert found.rejected == {}
    assert path.is_file()
    parting = found.partings["network.onnx"]
    assert parting is not None
    assert parting.layer == "conv1"
    with pytest.raises(BundleError, match=r"other\.safetensors: not the network that .* was exported from"):
        litdeploy.verify(out, against=tmp_path / "other.safetensors", target=TARGET)


def test_a_module_is_kept_with_its_files(tmp_path: Path) -> None:
    """Whatever its constructor takes: an instance or a factory names it, in every verb."""
    out = tmp_path / "exported"
    torch.manual_seed(0)
    module = Small(width=12)
    exports = litdeploy.export(module, out=out, target=TARGET)
    assert isinstance(exports, Exports)
    assert exports.network.path == str(out / "network.safetensors")
    litdeploy.export(load(module), out=out, target=TARGET)  # the same network again
    for network in (Small(width=12), lambda: Small(width=12)):
        if not isinstance(network, nn.Module):
            network.__module__, network.__qualname__ = Small.__module__, Small.__qualname__
        assert litdeploy.verify(out, network=network, target=TARGET).within
    with pytest.raises(BundleError, match=r"holds exported files of another network .*; they are kept\."):
        litdeploy.export(Small(width=12), out=out, target=TARGET)
    assert ExportFolder(out).read() == litdeploy.export(module, out=out, target=TARGET)


def test_a_folder_of_transformers_brings_its_tokenizer(bert_folder: Path, reviews_path: Path, tmp_path: Path) -> None:
    made = new(f"hf:{bert_folder}", normalise=None, classes=2, seed=0)
    folder = tmp_path / "bert"
    made.module.save_pretrained(folder)
    for path in bert_folder.glob("token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "exported"
    litdeploy.export(folder, out=out, data={"source": str(reviews_path), "text_length": 8}, target=TARGET)
    assert carried_by(out / "network.onnx", TOKENIZER) == out / "transformers"
    assert litdeploy.evaluate(out / "network.onnx", data={"source": str(reviews_path), "text_length": 8}).images


def test_bundles_and_exports_are_told_apart(teacher_path: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    litdeploy.export(teacher_path, out=out, target=TARGET)
    for verb in (litdeploy.profile, litdeploy.inspect):
        with pytest.raises(BundleError, match="exported files of a network that was not compressed"):
            verb(out)
    with pytest.raises(BundleError, match="not litdeploy's"):
        litdeploy.export(teacher_path, out=bundle.path, target=TARGET)
    with pytest.raises(SettingsError, match=r"--out: .* is a bundle"):
        litdeploy.export(bundle, out=out, target=TARGET)
    litdeploy.export(bundle, target=TARGET)
    with pytest.raises(SettingsError, match=r"--against: .* is a bundle"):
        litdeploy.verify(bundle, against=teacher_path, target=TARGET)
    manifest = json.loads((out / "exports.json").read_text())
    (out / "exports.json").write_text(json.dumps({**manifest, "schema_version": 9}))
    with pytest.raises(BundleError, match="schema version 9"):
        litdeploy.verify(out, target=TARGET)
    (out / "exports.json").write_text("{}")
    with pytest.raises(BundleError, match="not a list of exported files"):
        litdeploy.verify(out, target=TARGET)


def test_a_tampered_file_of_a_folder_is_set_aside(teacher_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    litdeploy.export(teacher_path, out=out, target=TARGET)
    path = out / "network.onnx"
    model = onnx.load_model(path)
    bias = next(each for each in model.graph.initializer if each.dims == [10])
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save_model(model, path)
    with pytest.raises(BundleError, match="altered since it was exported"):
        litdeploy.verify(out, target=TARGET)
    folder = ExportFolder(out)
    artefact = folder.read().artefacts["onnx"]
    folder.add_artefact("onnx", artefact.model_copy(update={"sha256": litdeploy.inspect(path).sha256}))
    found = litdeploy.verify(out, target=TARGET)
    assert found.rejected == {"onnx": str(out / "network.onnx.rejected")}
    assert folder.read().artefacts == {}
