"""How the machine was while it measured: what else it did, and whether it held its clocks."""

from __future__ import annotations

import os
import time
from statistics import median
from types import TracebackType
from typing import Self

import torch

from litdeploy.profiler.machine import system
from litdeploy.profiler.machine.nvml import open_nvml
from litdeploy.profiler.schema import Conditions

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
