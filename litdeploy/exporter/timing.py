"""Which of two is faster: a short look, for a word at export. The profiler measures."""

from __future__ import annotations

import time
from statistics import median

import torch

from litdeploy.batch import Batch, device_of
from litdeploy.runtime import Runner

_WARM_UP = 5
_SECONDS = 1.0
_MOST_CALLS = 200


def interleaved_ms(first: Runner, second: Runner, batch: Batch) -> tuple[float, float]:
    """Median wall-clock milliseconds of a call of each, in turn, with the device idle before and after.

    Args:
        first, second: open, on one device.
        batch: what they take, on that device.
    """
    times: dict[Runner, list[float]] = {first: [], second: []}
    for runner in times:
        for _ in range(_WARM_UP):
            _call(runner, batch)
    started = time.perf_counter()
    for _ in range(_MOST_CALLS):
        for runner, taken in times.items():
            taken.append(_call(runner, batch))
        if time.perf_counter() - started > _SECONDS:
            break
    return median(times[first]), median(times[second])


def _call(runner: Runner, batch: Batch) -> float:
    device = device_of(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter_ns()
    runner.run(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - start) / 1e6
