"""What a call on CUDA costs beside its time on the device: copies, the whole way, its replay as a graph, energy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from litdeploy.networks.batch import Batch, device_of, mapped, tensors_of
from litdeploy.profiler.machine.nvml import Nvml, open_nvml
from litdeploy.profiler.measure.stopwatch import Call, DeviceStopwatch
from litdeploy.runtime import Runner

_CALLS = 64
_SECONDS = 1.0  # most for each of them
# NVML's counter of energy moves every 20 to 100 ms; over this long, one step more or less is little.
_ENERGY_SECONDS = 1.0
# Those that queue their work on the current stream and do nothing else, so that it can be captured.
_CAPTURED = ("eager", "compiled", "inductor")


@dataclass(frozen=True)
class DeviceTimes:
    """See `report.SideTiming`; all None on a CPU."""

    copy_in_ms: float | None = None
    copy_out_ms: float | None = None
    end_to_end_ms: float | None = None
    captured_ms: float | None = None
    energy_joules: float | None = None


def device_times(runner: Runner, batch: Batch) -> DeviceTimes:
    """Measures them, one runner at a time, once it is warm.

    Args:
        batch: on the runner's device.
    """
    device = device_of(batch)
    if device.type != "cuda":
        return DeviceTimes()
    stopwatch = DeviceStopwatch(device)
    with torch.no_grad():
        logits = runner.run(batch)
        on_host = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True).copy_(each) for each in tensors_of(batch)]
        host_logits = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
        arrived = mapped(torch.empty_like, batch)

        def copy_in() -> None:
            for there, here in zip(tensors_of(arrived), on_host, strict=True):
                there.copy_(here, non_blocking=True)

        def way() -> None:
            copy_in()
            host_logits.copy_(runner.run(arrived), non_blocking=True)
            stopwatch.wait()

        nvml = open_nvml(device)
        return DeviceTimes(
            copy_in_ms=_device_ms(stopwatch, copy_in),
            copy_out_ms=_device_ms(stopwatch, lambda: host_logits.copy_(logits, non_blocking=True)),
            end_to_end_ms=_host_ms(stopwatch, way),
            captured_ms=_captured_ms(stopwatch, runner, batch),
            energy_joules=None if nvml is None else _joules(stopwatch, nvml, lambda: runner.run(batch)),
        )


def _device_ms(stopwatch: DeviceStopwatch, call: Call) -> float:
    return median(reading.milliseconds for reading in stopwatch.time([call] * _CALLS))


def _host_ms(stopwatch: DeviceStopwatch, call: Callable[[], None]) -> float:
    """Median of the host's time for a call that waits for the device itself."""
    taken: list[float] = []
    stopwatch.wait()
    started = time.perf_counter()
    while len(taken) < _CALLS and time.perf_counter() - started < _SECONDS:
        start = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - start) / 1e6)
    return median(taken)


def _captured_ms(stopwatch: DeviceStopwatch, runner: Runner, batch: Batch) -> float | None:
    """The call as a CUDA graph; None for a backend that does more than queue work, and where it cannot be captured."""
    if runner.name not in _CAPTURED:
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            runner.run(batch)
    except RuntimeError:
        return None
    graph.replay()
    return _device_ms(stopwatch, graph.replay)


def _joules(stopwatch: DeviceStopwatch, nvml: Nvml, call: Call) -> float:
    """Energy of one call, over many in a row."""
    stopwatch.wait()
    calls, before, started = 0, nvml.joules(), time.perf_counter()
    while time.perf_counter() - started < _ENERGY_SECONDS:
        for _ in range(stopwatch.at_once):
            call()
        stopwatch.wait()
        calls += stopwatch.at_once
    return (nvml.joules() - before) / calls
