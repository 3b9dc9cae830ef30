"""How the calls are made: one after the other, with cold caches, or at a pace."""

from __future__ import annotations

from pathlib import Path

import torch

from litdeploy.config.target import Timing
from litdeploy.profiler.measure.stopwatch import Call, Stopwatch
from litdeploy.profiler.schema import Scenario

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_CACHE_WHERE_UNKNOWN = 64 * 2**20
_TIMES_THE_CACHE = 2


def scenario_of(timing: Timing) -> Scenario:
    """The scenario that was asked for."""
    if timing.cold_cache:
        return "cold cache"
    return "warm" if timing.pace is None else "paced"


def preparation(timing: Timing, device: torch.device, stopwatch: Stopwatch) -> Call | None:
    """What is done before each timed call, untimed; None where nothing is."""
    if timing.cold_cache:
        other = torch.empty(_TIMES_THE_CACHE * cache_bytes(device), dtype=torch.uint8, device=device)
        # Writing more than the last cache holds leaves nothing else in it; torch does so on all of its threads.
        return other.zero_
    if timing.pace is not None:
        return _Pace(timing.pace, stopwatch)
    return None


class _Pace:
    """Waits until it is time for the next call. One that is late is made at once, and the next ones count from it."""

    def __init__(self, a_second: float, stopwatch: Stopwatch) -> None:
        self._interval, self._stopwatch = 1 / a_second, stopwatch
        self._next = stopwatch.now()

    def __call__(self) -> None:
        self._stopwatch.wait()
        now = self._stopwatch.now()
        if now < self._next:
            self._stopwatch.sleep(self._next - now)
        self._next = max(self._next, now) + self._interval


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_bytes(path.read_text()) for path in _CACHES.glob("index*/size")]
    return max(sizes, default=_CACHE_WHERE_UNKNOWN)


def _bytes(text: str) -> int:
    """Reads `32768K`."""
    text = text.strip()
    factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:])
    return int(text[:-1]) * factor if factor else int(text)
