from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from litdeploy.data import normalise
from litdeploy.errors import DependencyError, LitdeployError, RunnerError
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.formats.tensorrt import Builder, EngineOptions, build_engine, choose_library
from litdeploy.networks import Network
from litdeploy.runtime import open_runner
from litdeploy.runtime.engine import BatchProfile
from litdeploy.runtime.tensorrt import TensorRTRunner
from litdeploy.storage.bundle import sidecar_of

CUDA = torch.device("cuda", 0)
NAMES = ("tensorrt", "tensorrt-graph")
PIXELS = {"preprocessing": "embedded", "mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]"}
every_runner = pytest.mark.parametrize("name", NAMES)


def opened(path: Path, name: str = "tensorrt") -> TensorRTRunner:
    runner = open_runner(name, path=path, device=CUDA)
    assert isinstance(runner, TensorRTRunner)
    return runner


def with_detail(path: Path, **changes: object) -> Path:
    sidecar = sidecar_of(path)
    content = json.loads(sidecar.read_text())
    content["details"].update(changes)
    sidecar.write_text(json.dumps(content))
    return path


@every_runner
def test_it_runs_on_cuda_only(name: str, engine_path: Path) -> None:
    with pytest.raises(RunnerError, match=f"the runner '{name}' runs on cuda, not on cpu. Use --device cuda"):
        open_runner(name, path=engine_path, device=torch.device("cpu"))
    with pytest.raises(RunnerError, match="no precision 'fp8'"):
        open_runner(name, path=engine_path, device=CUDA, precision="fp8")


@every_runner
def test_an_altered_engine_is_not_loaded(name: str, engine_path: Path) -> None:
    engine_path.write_bytes(b"another")
    with pytest.raises(RunnerError, match="SHA-256 differs"), opened(engine_path, name):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"input_type": "uint8", "input_shape": ["batch", 8, 8, 3]},
        {"input_shape": ["batch", 192]},
        {"output_shape": ["batch", 10, 4, 4]},
        {"output_shape": ["batch", "classes"]},
    ],
)
def test_an_engine_that_is_no_classifier_of_images_is_refused(engine_path: Path, changes: dict[str, object]) -> None:
    runner = opened(with_detail(engine_path, **changes))
    with pytest.raises(RunnerError, match=r"not an engine.*but it has images .* and logits"), runner:
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"input_type": "uint8", "input_shape": ["batch", 8, 8, 3], "metadata": PIXELS},
        {"input_type": "float16", "output_type": "float16"},
    ],
)
def test_an_engine_that_takes_pixels_or_half_precision_is_a_classifier(
    engine_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    """What it is held against next is the library, which is not there."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DependencyError), opened(with_detail(engine_path, **changes)):
        pass


def test_without_the_library_that_built_it_it_says_what_to_install(
    engine_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DependencyError, match=r"extra-index-url https://pypi\.nvidia\.com"), opened(engine_path):
        pass


@pytest.mark.tensorrt
def test_without_a_gpu_it_says_so(engine_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sidecar = sidecar_of(engine_path)
    sidecar.write_text(sidecar.read_text().replace('"tensorrt"', '"tensorrt_rtx"'))
    with pytest.raises(RunnerError, match="needs a CUDA GPU, and PyTorch finds none"), opened(engine_path):
        pass


def test_outside_its_block_it_says_so(engine_path: Path) -> None:
    with pytest.raises(RunnerError, match="is not open"):
        opened(engine_path).run(torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def choice() -> Builder:
    """The library that builds for the GPU at hand. Only tests marked `gpu` ask for it."""
    try:
        return choose_library(CUDA)
    except LitdeployError as error:
        pytest.skip(f"no TensorRT for this GPU: {error}")


@pytest.fixture(scope="module")
def built(choice: Builder, onnx_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "network.engine"
    options = EngineOptions("fp32", BatchProfile(min=2, opt=4, max=8), timing_cache_dir=path.parent / "timings")
    build_engine(onnx_path, path, choice, options)
    return path


@pytest.fixture(scope="module")
def expected(network: Network) -> Tensor:
    return network.module(network.example(8)).detach()


@pytest.mark.gpu
@pytest.mark.tensorrt
@every_runner
def test_logits_are_those_of_the_module_for_every_batch_in_the_profile(
    name: str, built: Path, network: Network, expected: Tensor
) -> None:
    images = network.example(8).to(CUDA)
    with opened(built, name) as runner:
        for size in (2, 3, 8, 4, 2):
            for batch in (images[:size], images[:size].to(memory_format=torch.channels_last)):
                logits = runner.run(batch)
                assert logits.shape == (size, 10)
                assert (logits.dtype, logits.device) == (torch.float32, CUDA)
                torch.testing.assert_close(logits.cpu(), expected[:size], atol=1e-4, rtol=1e-4)
        described = runner.describe()
    assert (described.runner, described.precision) == (name, "fp32")
    assert described.build_seconds > 0
    with pytest.raises(RunnerError, match="is not open"):
        runner.run(images)


@pytest.mark.gpu
@pytest.mark.tensorrt
@every_runner
def test_an_engine_that_takes_pixels_is_given_them(
    name: str, choice: Builder, network: Network, tmp_path: Path
) -> None:
    export_onnx(network, tmp_path / "pixels.onnx", None, embedded=True)
    path, options = tmp_path / "pixels.engine", EngineOptions("fp32", BatchProfile(min=1, opt=2, max=4))
    build_engine(tmp_path / "pixels.onnx", path, choice, options)
    pixels_NCHW = torch.randint(0, 256, (4, *network.spec.input.shape), dtype=torch.uint8)
    images_NCHW = normalise(pixels_NCHW, network.spec.input)
    with opened(path, name) as runner:
        logits = runner.run(images_NCHW.to(CUDA)).cpu()
        with pytest.raises(RunnerError, match=r"takes float32 images of shape \(N, 3, 8, 8\)"):
            runner.run(torch.zeros(2, 8, 8, 3, device=CUDA))
    torch.testing.assert_close(logits, network.module(images_NCHW).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.tensorrt
@every_runner
def test_a_batch_outside_the_profile_says_the_range(name: str, built: Path, network: Network) -> None:
    with opened(built, name) as runner:
        for size in (1, 9):
            with pytest.raises(RunnerError, match=f"takes batches of 2 to 8 images, and was given {size}"):
                runner.run(network.example(size).to(CUDA))
        with pytest.raises(RunnerError, match=r"takes float32 images of shape \(N, 3, 8, 8\)"):
            runner.run(torch.zeros(2, 3, 8, 9, device=CUDA))


@pytest.mark.gpu
@pytest.mark.tensorrt
@every_runner
@pytest.mark.parametrize("side_stream", [True, False])
def test_it_takes_its_place_in_the_current_stream(
    name: str, side_stream: bool, built: Path, network: Network, expected: Tensor
) -> None:
    images = network.example(8).to(CUDA)
    with opened(built, name) as runner:
        runner.run(images)
        stream = torch.cuda.Stream(CUDA) if side_stream else torch.cuda.default_stream(CUDA)
        for _ in range(20):
            with torch.cuda.stream(stream):
                # Slow work first: a runner that does not wait for it reads zeros.
                batch = torch.zeros_like(images)
                torch.cuda._sleep(2_000_000)
                batch.copy_(images)
                doubled = runner.run(batch) * 2
            torch.testing.assert_close(doubled.cpu() / 2, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_a_caller_may_capture_it(built: Path, network: Network, expected: Tensor) -> None:
    batch = network.example(8).to(CUDA)
    with opened(built) as runner:
        runner.run(batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = runner.run(batch)
        graph.replay()
        torch.testing.assert_close(logits.cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_an_engine_of_another_gpu_or_version_says_what_differs(built: Path, tmp_path: Path) -> None:
    path = tmp_path / built.name
    path.write_bytes(built.read_bytes())
    original = json.loads(sidecar_of(built).read_text())
    for part, changes, message in (
        ("details", {"compute_capabilities": ["1.0"]}, r"built for GPUs of compute capability 1\.0"),
        ("versions", {original["details"]["library"]: "1.0.0"}, r"built by \w+ 1\.0\.0, and"),
    ):
        content = {**original, part: {**original[part], **changes}}
        sidecar_of(path).write_text(json.dumps(content))
        with pytest.raises(RunnerError, match=message), opened(path):
            pass


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_timings_are_kept_and_used_again(choice: Builder, onnx_path: Path, tmp_path: Path) -> None:
    if choice.library == "tensorrt_rtx":
        pytest.skip("tensorrt_rtx keeps no timings")
    options = EngineOptions("fp32", BatchProfile(min=1, opt=1, max=1), timing_cache_dir=tmp_path / "timings")
    first, second = (build_engine(onnx_path, tmp_path / "some.engine", choice, options) for _ in range(2))
    assert not first.details["timing_cache"]
    assert second.details["timing_cache"]
    assert second.details["precisions"]["source"] == "engine"
    [kept] = (tmp_path / "timings").iterdir()
    assert choice.version in kept.name
    kept.write_bytes(b"torn")
    assert not build_engine(onnx_path, tmp_path / "some.engine", choice, options).details["timing_cache"]
