from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from litdeploy.config.target import Target
from litdeploy.errors import NetworkError, RunnerError, SettingsError
from litdeploy.evaluation import evaluate
from litdeploy.exporter import export
from litdeploy.exporter.formats.inductor import export_aoti
from litdeploy.inspection import inspect
from litdeploy.networks import Network
from litdeploy.storage.bundle import Bundle

CPU = torch.device("cpu")


@pytest.mark.slow
def test_a_package_in_bf16_with_pixels_for_input_is_verified_and_evaluated(bundle: Bundle) -> None:
    target = Target(device="cpu", batch_sizes=(1, 16))
    manifest = export(bundle, onnx=False, aoti=True, precisions=("bf16",), embed_preprocessing=True, target=target)
    artefact = manifest.artefacts["aoti-bf16"]
    assert artefact.path == "export/student.bf16.pt2"
    assert set(artefact.versions) == {"torch"}
    assert artefact.details["metadata"]["preprocessing"] == "embedded"
    assert artefact.details["built_for"]["device"] == "cpu"
    assert "--aoti --precision bf16 --embed-preprocessing" in artefact.details["command"]
    assert json.loads((bundle.export_path / "student.bf16.pt2.json").read_text())["sha256"] == artefact.sha256
    assert inspect(bundle.export_path / "student.bf16.pt2") == artefact
    measured = artefact.details["parity"]["accuracy"]["candidate"]
    found = evaluate(bundle.export_path / "student.bf16.pt2", data="digits", device="cpu")
    assert (found.images, found.top1) == (measured["images"], measured["top1"])


class BranchesOnPixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(images.flatten(1) if images.sum() > 0 else -images.flatten(1))
        return logits


def test_a_network_that_cannot_be_exported_says_why(student: Network, tmp_path: Path) -> None:
    network = Network(BranchesOnPixels().eval(), student.spec, "mine.py")
    with pytest.raises(NetworkError, match=r"mine.py: torch.export cannot export resnet for any batch size: \w"):
        export_aoti(network, tmp_path / "mine.pt2", CPU)
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_it_says_what_to_install(student: Network, tmp_path: Path) -> None:
    with (
        inductor_config.patch({"force_disable_caches": True, "cpp.cxx": (str(tmp_path / "none"),)}),
        pytest.raises(RunnerError, match=r"C\+\+ compiler \(apt-get install g\+\+\)"),
    ):
        export_aoti(student, tmp_path / "student.pt2", CPU)


@pytest.mark.gpu
def test_for_another_gpu_than_is_at_hand_it_is_refused(bundle: Bundle) -> None:
    target = Target(device="cuda", compute_capability="1.0")
    with pytest.raises(SettingsError, match="compiles for the GPU at hand"):
        export(bundle, onnx=False, aoti=True, target=target)
