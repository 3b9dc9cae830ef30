"""A small network with statistics as after training, its ONNX file, and a file that stands for a TensorRT engine."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from litdeploy.config.formats import FORMATS
from litdeploy.exporter.formats.inductor import export_aoti
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.files import sha256_of
from litdeploy.networks import Network, new
from litdeploy.runtime.engine import BatchProfile, EngineDetails, Precisions
from litdeploy.storage.bundle import sidecar_of
from litdeploy.storage.records import Artefact
from litdeploy.storage.staging import write_sidecar


@pytest.fixture(scope="session")
def network() -> Network:
    network = new("resnet,depth=8,width=4", normalise="half", input_shape=(3, 8, 8), classes=10, seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in network.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return Network(network.module.eval(), network.spec, network.source)


@pytest.fixture(scope="session")
def onnx_path(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "network.onnx"
    export_onnx(network, path, None)
    return path


def packaged(network: Network, path: Path, device: torch.device) -> Path:
    """An AOTInductor package with its sidecar."""
    details = export_aoti(network, path, device)
    write_sidecar(
        path,
        Artefact(
            path=path.name,
            sha256=sha256_of(path),
            precision="fp32",
            versions=FORMATS["aoti"].versions(),
            details={**details, "command": "litdeploy export --aoti"},
        ),
    )
    return path


@pytest.fixture(scope="session")
def package_path(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packaged(network, tmp_path_factory.mktemp("export") / "network.pt2", torch.device("cpu"))


@pytest.fixture(scope="session")
def cuda_package_path(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packaged(network, tmp_path_factory.mktemp("export") / "cuda.pt2", torch.device("cuda", 0))


@pytest.fixture
def engine_path(tmp_path: Path) -> Path:
    """A file and the sidecar of an engine. No library has built it, and none would load it."""
    path, content = tmp_path / "student.engine", b"an engine"
    path.write_bytes(content)
    details = EngineDetails(
        library="tensorrt",
        gpu="A10",
        compute_capabilities=("8.6",),
        version_compatible=False,
        hardware_compatibility="none",
        batches=BatchProfile(min=1, opt=8, max=64),
        input="images",
        output="logits",
        input_shape=("batch", 3, 8, 8),
        output_shape=("batch", 10),
        input_type="float32",
        output_type="float32",
        metadata={},
        onnx_sha256="0" * 64,
        command="litdeploy export deploy --trt",
        memory_limit=None,
        timing_cache=False,
        precisions=Precisions(source="engine", layers={"fp16": 1.0}, weights={"fp16": 1.0}),
        bytes=len(content),
    )
    artefact = Artefact(
        path=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        precision="fp16",
        versions={"tensorrt": "10.9.0.34", "cuda": "13"},
        details=details.model_dump(mode="json"),
    )
    sidecar_of(path).write_text(artefact.model_dump_json())
    return path
