"""How long a call takes: two runners timed in turn, so that whatever else the machine does meets both alike."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

from litdeploy.config.target import Timing
from litdeploy.networks.batch import Batch, device_of
from litdeploy.profiler.machine.conditions import Watch
from litdeploy.profiler.measure.memory import MemoryMeter
from litdeploy.profiler.measure.scenarios import preparation
from litdeploy.profiler.measure.statistics import median_interval
from litdeploy.profiler.measure.stopwatch import Call, Reading, Stopwatch, overhead_ms, stopwatch_of
from litdeploy.profiler.schema import Samples, Stopped, Timed
from litdeploy.runtime import Runner

# A block is one of these; each side has the same mean position in both, so that a steady drift cancels out.
_BLOCKS = ("TSST", "STTS")
_CALLS_A_SIDE_AND_BLOCK = 2

_WARM_UP_WINDOW = 10  # calls whose median must agree with that of as many calls before them
_WARM_UP_AGREEMENT = 0.02
_WARM_UP_SHARE = 0.1  # of `max_seconds`, for each side: a noisy machine never settles

# The intervals are looked at each time that there are so many times as many samples: looking after each block, one
# would end at the moment when they happen to be narrow.
_LOOK_AGAIN = 1.25


def measure(
    teacher: Runner,
    student: Runner,
    batch: Batch,
    timing: Timing,
    seed: int = 0,
    stopwatch: Stopwatch | None = None,
    memory: tuple[MemoryMeter, MemoryMeter] | None = None,
) -> Timed:
    """Times two runners in turn on one batch, in randomised blocks TSST or STTS, until it settles or a limit is met.

    Args:
        teacher, student: on the batch's device.
        batch: what they take.
        timing: how long to warm up, when to end, and how the calls are made; `max_seconds` counts from after the first
            run, which may compile. At least one block is timed whatever the limit.
        seed: of the blocks' order.
        stopwatch: None: the one for the batch's device.
        memory: to which the first runs of teacher and student count.

    Raises:
        RunnerError: a runner cannot run this batch.
    """
    stopwatch = stopwatch or stopwatch_of(device_of(batch))
    calls: dict[str, Call] = {"T": lambda: teacher.run(batch), "S": lambda: student.run(batch)}
    with torch.no_grad():
        meters = memory or (MemoryMeter(device_of(batch)), MemoryMeter(device_of(batch)))
        first = {
            side: _first_run_ms(call, stopwatch, meter)
            for (side, call), meter in zip(calls.items(), meters, strict=True)
        }
        started = stopwatch.now()
        before = preparation(timing, device_of(batch), stopwatch)
        for call in calls.values():
            _warm_up(call, stopwatch, timing)
        overhead = overhead_ms(stopwatch)
        with Watch(device_of(batch)) as watch:
            order, readings, stopped = _alternate(
                calls, stopwatch, timing, before, watch, deadline=started + timing.max_seconds, seed=seed
            )
    sides = {side: _samples(first[side], readings, order, side) for side in calls}
    starts = tuple((reading.start_seconds - readings[0].start_seconds) * 1e3 for reading in readings)
    return Timed(stopwatch.clock, order, starts, sides["T"], sides["S"], stopped, overhead, watch.conditions)


def _first_run_ms(call: Call, stopwatch: Stopwatch, meter: MemoryMeter) -> float:
    """Host time of a call until the device is done with it, in milliseconds."""
    with meter.adding():
        start = stopwatch.now()
        call()
        stopwatch.wait()
        return (stopwatch.now() - start) * 1e3


def _samples(first: float, readings: list[Reading], order: str, wanted: str) -> Samples:
    mine = [reading for reading, side in zip(readings, order, strict=True) if side == wanted]
    return Samples(
        first,
        tuple(reading.milliseconds for reading in mine),
        tuple(reading.launch_ms for reading in mine if reading.launch_ms is not None),
        tuple(reading.cpu_ms for reading in mine if reading.cpu_ms is not None),
    )


def _warm_up(call: Call, stopwatch: Stopwatch, timing: Timing) -> None:
    """Calls until `warmup_ms` are over and the median of the last calls settled, or a share of `max_seconds` is up."""
    start = stopwatch.now()
    enough = timing.warmup_ms / 1e3
    limit = max(enough, _WARM_UP_SHARE * timing.max_seconds)
    before = float("inf")
    while True:
        window: list[float] = []
        while len(window) < _WARM_UP_WINDOW:
            window += [reading.milliseconds for reading in stopwatch.time([call])]
            if stopwatch.now() - start > limit:
                return
        now = median(window)
        settled = abs(now - before) <= _WARM_UP_AGREEMENT * before
        if settled and stopwatch.now() - start >= enough:
            return
        before = now


def _alternate(
    calls: dict[str, Call],
    stopwatch: Stopwatch,
    timing: Timing,
    before: Call | None,
    watch: Watch,
    deadline: float,
    seed: int,
) -> tuple[str, list[Reading], Stopped]:
    """Order and times of all timed calls, and why there are no more."""
    most = -(-timing.samples // _CALLS_A_SIDE_AND_BLOCK)
    generator = random.Random(seed)
    order = ""
    readings: list[Reading] = []
    settled = _Settled(timing, stopwatch.now)
    stopped: Stopped | None = None
    with _no_garbage_collection():
        while stopped is None:
            done = len(order) // 4
            block = "".join(generator.choice(_BLOCKS) for _ in range(min(stopwatch.at_once, most - done)))
            readings += stopwatch.time([calls[side] for side in block], before)
            order += block
            watch.look()
            if len(order) // 4 >= most:
                stopped = "samples"
            elif settled(order, readings):
                stopped = "settled"
            elif stopwatch.now() > deadline:
                stopped = "time limit"
    return order, readings, stopped


class _Settled:
    """Whether both medians are known as well as was asked for."""

    def __init__(self, timing: Timing, now: Callable[[], float]) -> None:
        self._half_width = timing.half_width
        self._look_at = timing.min_samples
        self._now, self._not_before = now, now() + timing.min_seconds

    def __call__(self, order: str, readings: list[Reading]) -> bool:
        samples = len(order) // 2
        if not self._half_width or samples < self._look_at or self._now() < self._not_before:
            return False
        self._look_at = int(_LOOK_AGAIN * samples) + 1
        return all(
            _half_width([reading.milliseconds for reading, mine in zip(readings, order, strict=True) if mine == side])
            <= self._half_width
            for side in "TS"
        )


def _half_width(milliseconds: list[float]) -> float:
    interval = median_interval(milliseconds)
    if interval is None:
        return float("inf")
    low, high = interval
    return (high - low) / (high + low)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collects now and not while the calls are timed: a collection would be counted to whichever call it meets."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
