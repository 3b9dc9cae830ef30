"""How the machine was while it measured: what else it did, and whether it held its clocks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from litdeploy.bundle import Record


class Gpu(Record):
    """What NVML tells of a GPU, sampled while it measured.

    Attributes:
        clock_mhz, clock_low_mhz: of its multiprocessors, the median and the least.
        max_clock_mhz: that it can have.
        memory_clock_mhz: the median.
        temperature_c: the highest.
        power_watts: the median.
        throttle_reasons: why its clocks were held down, in NVML's words; empty where they were not.
    """

    clock_mhz: float
    clock_low_mhz: float
    max_clock_mhz: float
    memory_clock_mhz: float
    temperature_c: float
    power_watts: float
    throttle_reasons: tuple[str, ...]


class Conditions(Record):
    """What else happened in the seconds of one measurement. None stands where the system does not tell.

    Attributes:
        seconds: that it took, without warm-up.
        pinned_cores: the cores that this process was held to; None where it was not.
        other_load: cores' worth of work by other processes, on the cores that this process may use.
        stolen: share of those cores' time that the hypervisor gave to other machines.
        preemptions: times that another process took the core in the midst of work (involuntary context switches).
        quota_seconds: that the process was stopped for, having used up its quota of processor time (cgroup).
        clock_mhz, clock_low_mhz: of the pinned cores, the median and the least.
        gpu: of the GPU that it ran on; None on a CPU, and without NVML.
    """

    seconds: float
    pinned_cores: tuple[int, ...] | None = None
    other_load: float | None = None
    stolen: float | None = None
    preemptions: int | None = None
    quota_seconds: float | None = None
    clock_mhz: float | None = None
    clock_low_mhz: float | None = None
    gpu: Gpu | None = None


@dataclass
class Watched:
    """What was seen, once the watching is over."""

    conditions: Conditions


@contextmanager
def watching(device: torch.device) -> Iterator[Watched]:
    """Watches the machine while it is open."""
    watched = Watched(Conditions(seconds=0.0))
    started, preempted = time.perf_counter(), _preemptions()
    yield watched
    watched.conditions = Conditions(
        seconds=time.perf_counter() - started,
        preemptions=None if preempted is None else (_preemptions() or 0) - preempted,
    )


def _preemptions() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
