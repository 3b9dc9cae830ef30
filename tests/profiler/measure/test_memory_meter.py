from __future__ import annotations

import sys

import pytest
import torch

from litdeploy.profiler.measure.memory_meter import MemoryMeter

MEGABYTE = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_what_is_taken_and_given_back_is_in_the_peak() -> None:
    meter = MemoryMeter(torch.device("cpu"))
    assert meter.peak_bytes is None
    with meter.charge():
        torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    assert meter.peak_bytes is not None
    assert 63 * MEGABYTE <= meter.peak_bytes < 80 * MEGABYTE


@linux
def test_what_is_kept_is_added_to_what_comes_later() -> None:
    meter = MemoryMeter(torch.device("cpu"))
    with meter.charge():
        kept = torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    with meter.charge():
        torch.ones(32 * MEGABYTE, dtype=torch.uint8)
    assert meter.peak_bytes is not None
    assert 95 * MEGABYTE <= meter.peak_bytes < 112 * MEGABYTE
    assert len(kept)


@pytest.mark.gpu
def test_on_a_device_it_is_the_devices_memory() -> None:
    meter = MemoryMeter(torch.device("cuda", 0))
    with meter.charge():
        kept = torch.ones(256 * MEGABYTE, dtype=torch.uint8, device="cuda")
    assert meter.peak_bytes is not None
    assert meter.peak_bytes >= 256 * MEGABYTE
    assert len(kept)
