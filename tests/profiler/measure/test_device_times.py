from __future__ import annotations

import pytest
import torch

from litdeploy.networks import new
from litdeploy.profiler.measure.device_times import DeviceTimes, device_times
from litdeploy.runtime import open_runner

NETWORK = new("resnet20", normalise="none", input_shape=(3, 32, 32), classes=10, seed=0)


def test_a_processor_copies_and_captures_nothing() -> None:
    with open_runner("eager", network=NETWORK, device=torch.device("cpu")) as runner:
        assert device_times(runner, NETWORK.example(2)) == DeviceTimes()


@pytest.mark.gpu
def test_the_whole_way_is_longer_than_its_parts() -> None:
    device = torch.device("cuda", 0)
    with open_runner("eager", network=NETWORK, device=device) as runner:
        found = device_times(runner, NETWORK.example(64).to(device))
    assert found.copy_in_ms is not None
    assert found.copy_out_ms is not None
    assert found.end_to_end_ms is not None
    assert found.end_to_end_ms > found.copy_in_ms + found.copy_out_ms
    assert found.captured_ms is not None
    assert 0 < found.captured_ms < found.end_to_end_ms
