"""The user's own data and modules, from `compress` to verified files: a signal, a volume, and two inputs by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import litdeploy
from litdeploy.config.spec import InputTensor, TensorInput
from litdeploy.errors import DataError, TrainingError
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Manifest
from litdeploy.trainer import Progress

N = 48
Y = torch.arange(N) % 3
SIGNALS = torch.randn(N, 1, 32, generator=torch.Generator().manual_seed(0)) + Y[:, None, None]
TABLE = Y[:, None].float().expand(N, 4)


class Block(nn.Module):
    def __init__(self, convolution: type[nn.Module], norm: type[nn.Module]) -> None:
        super().__init__()
        self.convolution, self.norm = convolution(4, 4, 3, padding=1), norm(4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + torch.relu(self.norm(self.convolution(x)))
        return result


class Signal(nn.Module):
    """A classifier of signals, and of the table beside them if it takes one."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 4, 5, 2, 2)
        self.body = nn.Sequential(*[Block(nn.Conv1d, nn.BatchNorm1d) for _ in range(3)])
        self.head = nn.Linear(4, classes)

    def forward(self, waveform: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(self.stem(waveform)).mean(-1))
        return result


class Beside(Signal):
    def forward(self, waveform: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
        result: Tensor = self.head(self.body(self.stem(waveform)).mean(-1) + table)
        return result


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 3, 2, 1)
        self.body = nn.Sequential(*[Block(nn.Conv3d, nn.BatchNorm3d) for _ in range(3)])
        self.head = nn.Linear(4, 3)

    def forward(self, volume: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(self.stem(volume)).mean((-1, -2, -3)))
        return result


class Volumes(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        return SIGNALS[row].view(1, 4, 4, 2), int(Y[row])


class Named(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        return {"waveform": SIGNALS[row], "table": TABLE[row], "labels": Y[row]}


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def compressed(teacher: nn.Module, folder: Path, **given: Any) -> tuple[Bundle, Manifest]:
    settings = {"student_blocks": {"body": 1}, "epochs": 2, "device": "cpu", "precision": "fp32", **given}
    bundle = litdeploy.compress(teacher, out=folder, **settings)
    return bundle, bundle.read_complete()


def test_a_loader_of_signals_all_the_way(tmp_path: Path) -> None:
    rows, notes = TensorDataset(SIGNALS, Y), Notes()
    loader = DataLoader(rows, batch_size=8, shuffle=True)
    bundle, manifest = compressed(Signal(3), tmp_path / "b", data=loader, val_data=rows, progress=notes)
    assert manifest.student.input == TensorInput.of((1, 32), "waveform")
    assert manifest.student.plan == {"body": (0,)}
    assert (manifest.recipe.batch_size, manifest.recipe.data.source) == (8, None)
    assert (manifest.data.noun, manifest.data.images) == ("sample", {"train": N, "validation": N, "test": N})
    assert "validation and test: TensorDataset" in manifest.data.source
    assert any("no features are kept" in line for line in notes.lines)
    network = Signal  # the name in the bundle is this class's
    files = litdeploy.export(bundle, network=network, data=rows)
    assert litdeploy.verify(bundle, network=network, data=loader).within
    assert litdeploy.verify(bundle, network=network).within  # on noise
    assert files.artefacts["onnx"].details["inputs"] == {"waveform": ["batch", 1, 32]}
    score = litdeploy.evaluate(bundle.path, network=network, data=(SIGNALS, Y))
    assert score == manifest.metrics["student"]["test"]


def test_a_dataset_of_volumes_is_cached(tmp_path: Path) -> None:
    notes = Notes()
    _, manifest = compressed(Volume(), tmp_path, data=Volumes(), batch_size=8, progress=notes)
    assert manifest.student.input == TensorInput.of((1, 4, 4, 2), "volume")
    assert manifest.data.test_is_held_out
    assert any(line.startswith("feature cache: 1 view of") for line in notes.lines)


def test_two_inputs_by_name(tmp_path: Path) -> None:
    bundle, manifest = compressed(Beside(4), tmp_path, data=DataLoader(Named(), 8), val_data=Named())
    tensors = InputTensor("waveform", "float32", (1, 32)), InputTensor("table", "float32", (4,))
    assert manifest.student.input == TensorInput(tensors=tensors)
    files = litdeploy.export(bundle, network=Beside(4), data=Named(), precisions=("fp32", "int8"), calibration_images=8)
    assert list(files.artefacts) == ["onnx", "onnx-int8"]


def test_a_dataset_is_trained_to_the_same_bits_again_and_resumed(tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": (SIGNALS, Y), "batch_size": 8}
    weights = [load_file(compressed(signal(), tmp_path / name, **given)[0].student_path) for name in ("a", "b")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    bundle, _ = compressed(signal(), tmp_path / "a", **given, resume=True)  # is complete already
    assert weights[0].keys() == load_file(bundle.student_path).keys()


def signal() -> Signal:
    torch.manual_seed(0)
    return Signal()


def test_fewer_samples_than_a_batch_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="fewer than one batch"):
        compressed(Signal(), tmp_path / "b", data=(SIGNALS[:9], Y[:9]), batch_size=32)
    with pytest.raises(DataError, match=r"forward:  Volume.forward\(volume"):
        compressed(Volume(), tmp_path / "b", data=(SIGNALS, Y))
    assert not (tmp_path / "b").exists()
