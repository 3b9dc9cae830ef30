"""The contract that every runner keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from litdeploy.config.formats import runners
from litdeploy.errors import RunnerError
from litdeploy.networks import Network
from litdeploy.runtime import Runner, open_runner

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# These run on a GPU alone: test_tensorrt.py and test_onnxruntime.py hold them to the same contract.
ON_GPUS = ("tensorrt", "tensorrt-graph", "onnxruntime-graph")
every_runner = pytest.mark.parametrize("name", [name for name in runners() if name not in ON_GPUS])
every_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def runner(request: pytest.FixtureRequest, name: str, device: str, network: Network, onnx_path: Path) -> Runner:
    path = onnx_path
    if name == "inductor":
        path = request.getfixturevalue("package_path" if device == "cpu" else "cuda_package_path")
    return open_runner(name, network=network, path=path, device=torch.device(device))


@every_device
@every_runner
def test_logits_are_those_of_the_module(runner: Runner, network: Network) -> None:
    with runner:
        for size in (1, 3, 8):
            batch = network.example(size)
            logits = runner.run(batch.to(runner.device))
            assert logits.shape == (size, 10)
            assert logits.dtype == torch.float32
            assert logits.device == runner.device
            with torch.no_grad():
                torch.testing.assert_close(logits.cpu(), network.module(batch), atol=1e-4, rtol=1e-4)


@every_device
@every_runner
def test_a_batch_in_another_memory_format_or_with_gradient_is_taken(runner: Runner, network: Network) -> None:
    batch = network.example(3).to(runner.device)
    with runner:
        expected = runner.run(batch)
        for same in (batch.to(memory_format=torch.channels_last), batch.clone().requires_grad_()):
            torch.testing.assert_close(runner.run(same), expected, atol=1e-4, rtol=1e-4)


@every_runner
@pytest.mark.parametrize("device", ["cpu"])
def test_outside_its_block_it_says_so(runner: Runner, network: Network) -> None:
    with pytest.raises(RunnerError, match="is not open"):
        runner.run(network.example(1))
    with runner:
        pass
    with pytest.raises(RunnerError, match="is not open"):
        runner.run(network.example(1))


@every_runner
@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 3, 8, 9),
        torch.zeros(3, 8, 8),
        torch.zeros(0, 3, 8, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.float64),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 8, device="meta"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(runner: Runner, batch: torch.Tensor) -> None:
    with runner, pytest.raises(RunnerError, match=r"takes float32 images of shape \(N, 3, 8, 8\) on cpu"):
        runner.run(batch)


@every_device
@every_runner
def test_it_describes_how_it_runs(runner: Runner) -> None:
    with runner:
        description = runner.describe()
    assert (description.runner, description.precision) == (runner.name, "fp32")
    assert description.device
    assert description.mode
    assert description.versions
    assert description.build_seconds > 0


@every_runner
@pytest.mark.parametrize("device", ["cpu"])
def test_the_network_is_left_as_it_was(runner: Runner, network: Network) -> None:
    network.module.train()
    weight = next(network.module.parameters())
    try:
        with runner:
            assert network.module.training
            assert weight.requires_grad
            assert weight.is_contiguous()
    finally:
        network.module.eval()


@pytest.mark.parametrize("name", runners())
def test_without_its_source_it_says_what_is_missing(name: str) -> None:
    with pytest.raises(RunnerError, match=r": pass (network|path)=…"):
        open_runner(name, device=CPU)


@every_runner
def test_an_unknown_precision_is_refused(name: str, network: Network, onnx_path: Path) -> None:
    with pytest.raises(RunnerError, match="no precision 'fp8'"):
        open_runner(name, network=network, path=onnx_path, device=CPU, precision="fp8")


def test_an_unknown_runner_is_refused(network: Network) -> None:
    with pytest.raises(RunnerError, match="eager, compiled, onnxruntime, onnxruntime-graph, inductor"):
        open_runner("openvino", network=network, device=CPU)
