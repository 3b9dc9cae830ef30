from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from litdeploy.profiler.machine import cores as processor
from litdeploy.profiler.machine.conditions import ConditionsMonitor, Nvml, open_nvml
from litdeploy.profiler.machine.cores import pinned
from litdeploy.profiler.schema import Conditions, Gpu


class Library:
    """A part of pynvml, for a GPU that gets hot."""

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
    assert nvml.summary() is None
    for _ in range(3):
        nvml.sample()
    assert nvml.summary() == Gpu(
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
    nvml.sample()
    seen = nvml.summary()
    assert seen is not None
    assert 0 < seen.clock_low_mhz <= seen.clock_mhz <= seen.max_clock_mhz
    assert nvml.joules() > 0


CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_other_work_on_the_same_core_is_seen() -> None:
    """A child spins on the core that this process is pinned to and sleeps on."""
    with pinned(1) as cores:
        assert cores is not None
        child = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            child.stdout.readline()
            with ConditionsMonitor(CPU) as monitor:
                time.sleep(0.6)
        finally:
            child.kill()
            child.communicate()
    seen = monitor.conditions
    assert seen.cores == cores
    assert seen.seconds >= 0.6
    assert seen.other_load is not None
    assert seen.machine_load is not None
    # The core is never idle, and this process uses little of it.
    assert seen.other_load > 0.5
    assert seen.machine_load >= 0.9 * seen.other_load


@linux
def test_own_work_is_no_other_load() -> None:
    with pinned(1), ConditionsMonitor(CPU) as monitor:
        until = time.process_time() + 0.4
        while time.process_time() < until:
            monitor.sample()
    seen = monitor.conditions
    assert seen.other_load is not None
    # All the work of the core, less that of this process.
    assert seen.other_load <= 1.1 - 0.4 / seen.seconds
    assert seen.preemptions is not None
    assert seen.gpu is None


@pytest.mark.parametrize(
    ("waiting", "cpu", "contended"),
    [
        (0.0, 2.0, False),  # nothing but work
        (1.0, 0.9, True),  # half of it work, half of it waiting
        (0.9, 0.0, False),  # asleep for the rest
        (None, 1.0, False),
    ],
)
def test_contended_is_waiting_and_work_alone(waiting: float | None, cpu: float, contended: bool) -> None:
    assert Conditions(seconds=2.0, waiting_seconds=waiting, cpu_seconds=cpu).contended == contended


def test_too_short_to_tell() -> None:
    with ConditionsMonitor(CPU) as monitor:
        pass
    assert monitor.conditions.other_load is None
    assert monitor.conditions.stolen is None


@linux
def test_what_the_system_tells() -> None:
    cores = os.sched_getaffinity(0)
    assert cores <= processor.all_cores()
    assert set(processor.busy_seconds(cores)) == cores
    assert processor.stolen_seconds(cores) is not None
    assert all(mhz > 100 for mhz in processor.clocks_mhz(cores))
