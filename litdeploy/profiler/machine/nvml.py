"""What NVML tells of an NVIDIA GPU: clocks, temperature, power, energy. Nothing without nvidia-ml-py."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from litdeploy.profiler.schema import Gpu

# Of NVML's nvmlClocksEventReasons: those that hold the clocks down for another reason than having nothing to do.
_THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


class Nvml:
    """Readings of one GPU.

    Args:
        library: pynvml, initialised.
        handle: of the GPU.
    """

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle
        self._clocks: list[float] = []
        self._memory_clocks: list[float] = []
        self._temperatures: list[float] = []
        self._watts: list[float] = []
        self._reasons = 0

    def look(self) -> None:
        """Reads everything once."""
        nvml, gpu = self._library, self._handle
        self._clocks.append(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM))
        self._memory_clocks.append(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM))
        self._temperatures.append(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))
        self._watts.append(nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3)
        self._reasons |= nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)

    def seen(self) -> Gpu | None:
        """What was read; None where nothing was."""
        if not self._clocks:
            return None
        nvml = self._library
        return Gpu(
            clock_mhz=median(self._clocks),
            clock_low_mhz=min(self._clocks),
            max_clock_mhz=nvml.nvmlDeviceGetMaxClockInfo(self._handle, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=median(self._memory_clocks),
            temperature_c=max(self._temperatures),
            power_watts=median(self._watts),
            throttle_reasons=tuple(name for mask, name in _THROTTLE_REASONS.items() if self._reasons & mask),
        )

    def joules(self) -> float:
        """Energy that the whole GPU took since its driver was loaded."""
        return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


def open_nvml(device: torch.device) -> Nvml | None:
    """NVML for a CUDA device; None on a processor, without nvidia-ml-py, and where it lacks what is read here.

    Old GPUs and slices of one (MIG) have no clocks or energy of their own.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # By UUID: NVML counts GPUs in another order than CUDA, and CUDA_VISIBLE_DEVICES hides some from CUDA alone.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        opened = Nvml(pynvml, handle)
        opened.look()
        opened.joules()
    except pynvml.NVMLError:
        return None
    return Nvml(pynvml, handle)
