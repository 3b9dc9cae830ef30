"""A small student with statistics as after training, and a whole bundle that holds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from litdeploy.config.recipe import DataSettings, Recipe
from litdeploy.networks import Network, new
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.storage.records import DataRecord, Manifest, RunRecord, TeacherRecord


@pytest.fixture(scope="session")
def student() -> Network:
    network = new("resnet,depth=8,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in network.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return Network(network.module.eval(), network.spec.with_(classes=tuple("0123456789")), network.source)


@pytest.fixture
def bundle(tmp_path: Path, student: Network) -> Bundle:
    return bundle_of(student, tmp_path / "deploy")


def bundle_of(student: Network, path: Path) -> Bundle:
    bundle = Bundle(path)
    bundle.claim(overwrite=False)
    sha256 = write_checkpoint(bundle.student_path, student.module.state_dict(), student.spec)
    bundle.write(
        Manifest(
            litdeploy="0",
            status="complete",
            teacher=TeacherRecord(path="teacher.pt", sha256="0" * 64, spec=student.spec),
            student=student.spec,
            student_sha256=sha256,
            recipe=Recipe(data=DataSettings(source="digits")),
            data=DataRecord(source="digits", fingerprint="0", images={"test": 360}),
            run=RunRecord(
                started="now", seconds=1, images_per_second=1, epochs=5, device="cpu", precision="fp32", versions={}
            ),
            metrics={},
        )
    )
    return bundle
