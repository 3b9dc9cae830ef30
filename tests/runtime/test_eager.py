from __future__ import annotations

import pytest
import torch

from litdeploy.networks import Network
from litdeploy.runtime import open_runner
from litdeploy.runtime.device import ieee_float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_is_near_fp32(network: Network, device: str) -> None:
    with open_runner("eager", network=network, device=torch.device(device), precision="bf16") as runner:
        logits = runner.run(network.example(8).to(runner.device))
    assert logits.dtype == torch.float32
    with torch.no_grad():
        expected = network.module(network.example(8))
    difference = (logits.cpu() - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_off_while_a_runner_runs_and_then_as_before(before: bool) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.allow_tf32 = before
    try:
        with ieee_float32(torch.device("cuda", 0)):
            assert not cudnn.allow_tf32
            assert not matmul.allow_tf32
        assert cudnn.allow_tf32 == before
        assert not matmul.allow_tf32
    finally:
        cudnn.allow_tf32 = True
