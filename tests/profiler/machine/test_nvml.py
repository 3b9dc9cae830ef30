"""NVML cannot be had without a GPU: what it would tell is written down here, under the names of nvidia-ml-py."""

from __future__ import annotations

import pytest
import torch

from litdeploy.profiler.machine.nvml import Nvml, open_nvml
from litdeploy.profiler.schema import Gpu


class Library:
    """Some of pynvml, for a GPU that gets hot."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self) -> None:
        self.clocks = iter((1980, 1755, 1200))
        self.reasons = iter((0x1, 0x4, 0x24))

    def nvmlDeviceGetClockInfo(self, handle: object, kind: int) -> int:
        return next(self.clocks) if kind == self.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetMaxClockInfo(self, handle: object, kind: int) -> int:
        return 1980

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int:
        return 71

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:
        return 698_500

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: object) -> int:
        return next(self.reasons)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int:
        return 12_500


def test_readings_are_summed_up() -> None:
    nvml = Nvml(Library(), None)
    assert nvml.seen() is None
    for _ in range(3):
        nvml.look()
    assert nvml.seen() == Gpu(
        clock_mhz=1755,
        clock_low_mhz=1200,
        max_clock_mhz=1980,
        memory_clock_mhz=2619,
        temperature_c=71,
        power_watts=698.5,
        throttle_reasons=("power cap", "software thermal slowdown"),
    )
    assert nvml.joules() == 12.5


def test_a_processor_has_none() -> None:
    assert open_nvml(torch.device("cpu")) is None


@pytest.mark.gpu
def test_a_gpu_tells_its_clocks() -> None:
    pytest.importorskip("pynvml")
    nvml = open_nvml(torch.device("cuda", 0))
    assert nvml is not None
    nvml.look()
    seen = nvml.seen()
    assert seen is not None
    assert 0 < seen.clock_low_mhz <= seen.clock_mhz <= seen.max_clock_mhz
    assert nvml.joules() > 0
