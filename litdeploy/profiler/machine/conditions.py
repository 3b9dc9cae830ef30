"""The machine before and during a measurement: hardware, libraries, other load, clocks, the GPU's state."""

from __future__ import annotations

import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from types import TracebackType
from typing import Any, Self

import torch

from litdeploy.limits import usable_cores
from litdeploy.profiler.machine import cores as processor
from litdeploy.profiler.schema import Conditions, Environment, Gpu
from litdeploy.runtime import device_name
from litdeploy.version import __version__

# Library → names of its distributions; the first one that is installed counts.
_LIBRARIES = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "numpy": ("numpy",),
}

# The kernel counts in hundredths of a second: over a shorter time, the share of another process is noise.
_LEAST_SECONDS = 0.2
_SAMPLE_EVERY_SECONDS = 0.25

# The bits of NVML's nvmlClocksEventReasons that lower the clocks for another reason than idleness.
_THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def current_environment(device: torch.device) -> Environment:
    """The machine and its software now."""
    return Environment(
        device=str(device),
        device_name=device_name(device),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        system=platform.platform(),
        python=platform.python_version(),
        litdeploy=__version__,
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def versions() -> dict[str, str]:
    """Installed versions of the libraries that affect timing, read without importing them."""
    found = {}
    for library, distributions in _LIBRARIES.items():
        for distribution in distributions:
            try:
                found[library] = version(distribution)
                break
            except PackageNotFoundError:
                continue
    return found


class ConditionsMonitor:
    """Context manager that records the load and the clocks of the machine.

    Attributes:
        conditions: the record, complete after exit.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml = open_nvml(device)
        self._cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else None
        self._clocks: list[float] = []
        self.conditions = Conditions(seconds=0.0)

    def __enter__(self) -> Self:
        self._before = _Counters(self._cores or ())
        self._next_sample = self._before.at
        self.sample()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._next_sample = 0.0
        self.sample()
        before, after = self._before, _Counters(self._cores or ())
        seconds = after.at - before.at
        known = seconds >= _LEAST_SECONDS
        self.conditions = Conditions(
            seconds=seconds,
            cores=self._cores,
            other_load=_rate(before.others, after.others, seconds) if known else None,
            machine_load=_rate(before.machine, after.machine, seconds) if known else None,
            stolen=_rate(before.stolen, after.stolen, seconds * len(self._cores or (0,))) if known else None,
            preemptions=None if after.preemptions is None else after.preemptions - (before.preemptions or 0),
            cpu_seconds=after.own - before.own,
            waiting_seconds=None if after.waiting is None else max(0.0, after.waiting - (before.waiting or 0)),
            quota_seconds=None if after.quota is None else after.quota - (before.quota or 0),
            clock_mhz=median(self._clocks) if self._clocks else None,
            clock_low_mhz=min(self._clocks, default=None),
            gpu=None if self._nvml is None else self._nvml.summary(),
        )

    def sample(self) -> None:
        """Read the values that have no counter, at most four times a second. Call it between two timed calls."""
        if time.perf_counter() < self._next_sample:
            return
        self._clocks += processor.clocks_mhz(self._cores or ())
        if self._nvml is not None:
            self._nvml.sample()
        self._next_sample = time.perf_counter() + _SAMPLE_EVERY_SECONDS


class _Counters:
    """All monotonic counters, read at one time."""

    def __init__(self, cores: tuple[int, ...]) -> None:
        self.at = time.perf_counter()
        self.own = own = time.process_time()
        busy = processor.busy_seconds(processor.all_cores())
        self.others = sum(busy[core] for core in cores if core in busy) - own if busy else None
        self.machine = sum(busy.values()) - own if busy else None
        self.stolen = processor.stolen_seconds(cores)
        self.preemptions = processor.preemptions()
        self.waiting = processor.waiting_seconds()
        self.quota = processor.quota_seconds()


def _rate(before: float | None, after: float | None, seconds: float) -> float | None:
    return None if before is None or after is None else max(0.0, (after - before) / seconds)


class Nvml:
    """Clocks, temperature, power and energy of one NVIDIA GPU.

    Args:
        library: pynvml, initialized.
        handle: the GPU's handle.
    """

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle
        self._clocks: list[float] = []
        self._memory_clocks: list[float] = []
        self._temperatures: list[float] = []
        self._watts: list[float] = []
        self._reasons = 0

    def sample(self) -> None:
        """Read all values once."""
        nvml, gpu = self._library, self._handle
        self._clocks.append(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM))
        self._memory_clocks.append(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM))
        self._temperatures.append(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))
        self._watts.append(nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3)
        self._reasons |= nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)

    def summary(self) -> Gpu | None:
        """Summary of the samples; None if there is none."""
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
        """Energy that the whole GPU has used since its driver was loaded."""
        return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


def open_nvml(device: torch.device) -> Nvml | None:
    """NVML for a CUDA device; None on a CPU, without nvidia-ml-py, and if the GPU lacks one of the values read here.

    Old GPUs and slices of a GPU (MIG) have no clocks or energy counter of their own.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # By UUID: NVML numbers the GPUs in another order than CUDA, and ignores CUDA_VISIBLE_DEVICES.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        trial = Nvml(pynvml, handle)
        trial.sample()
        trial.joules()
    except pynvml.NVMLError:
        return None
    return Nvml(pynvml, handle)
