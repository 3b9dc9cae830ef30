"""The machine before and during a measurement: hardware, libraries, load, clocks."""

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

from litdeploy.profiler.machine import cores as processor
from litdeploy.profiler.schema import Conditions, Environment, Gpu
from litdeploy.runtime import device_name
from litdeploy.version import __version__

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


# Distributions by the name that they are installed under; of each line the first that is there.
_LIBRARIES = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "numpy": ("numpy",),
}


def look_around(device: torch.device) -> Environment:
    """Records the machine as it is now."""
    return Environment(
        device=str(device),
        device_name=device_name(device),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        system=platform.platform(),
        python=platform.python_version(),
        litdeploy=__version__,
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def versions() -> dict[str, str]:
    """Versions of the libraries that a time depends on, as installed; none of them is imported for it."""
    found = {}
    for library, distributions in _LIBRARIES.items():
        for distribution in distributions:
            try:
                found[library] = version(distribution)
                break
            except PackageNotFoundError:
                continue
    return found


# The kernel counts in hundredths of a second: over less than this, another's share cannot be told.
_LEAST_SECONDS = 0.2
_LOOK_AGAIN_SECONDS = 0.25


class Watch:
    """Watches the machine while it is open; `conditions` is what it saw, afterwards."""

    def __init__(self, device: torch.device) -> None:
        self._nvml = open_nvml(device)
        self._cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else None
        self._clocks: list[float] = []
        self.conditions = Conditions(seconds=0.0)

    def __enter__(self) -> Self:
        self._before = _Counters(self._cores or ())
        self._look_at = self._before.at
        self.look()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look_at = 0.0
        self.look()
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
            gpu=None if self._nvml is None else self._nvml.seen(),
        )

    def look(self) -> None:
        """Reads what has no counter; between two timed calls, and no more often than four times a second."""
        if time.perf_counter() < self._look_at:
            return
        self._clocks += processor.clocks_mhz(self._cores or ())
        if self._nvml is not None:
            self._nvml.look()
        self._look_at = time.perf_counter() + _LOOK_AGAIN_SECONDS


class _Counters:
    """Everything that only grows, read at one time."""

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
