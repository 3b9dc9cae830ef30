"""How the machine was while it measured: what else it did, and whether it held its clocks."""

from __future__ import annotations

import os
import time
from statistics import median
from types import TracebackType
from typing import Self

import torch

from litdeploy.profiler.machine import system
from litdeploy.profiler.machine.nvml import Gpu, open_nvml
from litdeploy.storage.records import Record

# The kernel counts in hundredths of a second: over less than this, another's share cannot be told.
_LEAST_SECONDS = 0.2
_LOOK_AGAIN_SECONDS = 0.25
_MUCH = 0.1


class Conditions(Record):
    """What else happened in the seconds of one measurement. None stands where the system does not tell.

    Attributes:
        seconds: that it took, without warm-up.
        cores: those that this process was on; more than its threads where it was not pinned.
        other_load: cores' worth of work that other processes did on these cores.
        machine_load: the same on all cores of the machine; they share memory and the last cache with these.
        stolen: share of these cores' time that the hypervisor gave to other machines.
        preemptions: times that another process took the core in the midst of work (involuntary context switches).
        cpu_seconds: of processor time that this process had, in all its threads.
        waiting_seconds: that this process's threads were ready to run and had no core.
        quota_seconds: that the process was stopped for, having used up its quota of processor time (cgroup).
        clock_mhz, clock_low_mhz: of these cores, the median and the least.
        gpu: of the GPU that it ran on; None on a CPU, and without NVML.
    """

    seconds: float
    cores: tuple[int, ...] | None = None
    other_load: float | None = None
    machine_load: float | None = None
    stolen: float | None = None
    preemptions: int | None = None
    cpu_seconds: float | None = None
    waiting_seconds: float | None = None
    quota_seconds: float | None = None
    clock_mhz: float | None = None
    clock_low_mhz: float | None = None
    gpu: Gpu | None = None

    @property
    def contended(self) -> bool:
        """Whether its threads waited for a core in much of the time that they could have run; sleep does not count."""
        waited, worked = self.waiting_seconds or 0.0, self.cpu_seconds or 0.0
        return waited >= _MUCH * (waited + worked) > 0 and waited + worked >= (1 - _MUCH) * self.seconds


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
        self._clocks += system.clocks_mhz(self._cores or ())
        if self._nvml is not None:
            self._nvml.look()
        self._look_at = time.perf_counter() + _LOOK_AGAIN_SECONDS


class _Counters:
    """Everything that only grows, read at one time."""

    def __init__(self, cores: tuple[int, ...]) -> None:
        self.at = time.perf_counter()
        self.own = own = time.process_time()
        busy = system.busy_seconds(system.all_cores())
        self.others = sum(busy[core] for core in cores if core in busy) - own if busy else None
        self.machine = sum(busy.values()) - own if busy else None
        self.stolen = system.stolen_seconds(cores)
        self.preemptions = system.preemptions()
        self.waiting = system.waiting_seconds()
        self.quota = system.quota_seconds()


def _rate(before: float | None, after: float | None, seconds: float) -> float | None:
    return None if before is None or after is None else max(0.0, (after - before) / seconds)
