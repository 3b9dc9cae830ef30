"""How long a call takes: two runners timed in turn, so that any other load on the machine affects both alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import torch

from litdeploy.config.target import Timing
from litdeploy.networks.batch import Batch, device_of, mapped, tensors_of
from litdeploy.profiler.machine.conditions import ConditionsMonitor, Nvml, open_nvml
from litdeploy.profiler.measure.memory_meter import MemoryMeter
from litdeploy.profiler.measure.statistics import median_interval
from litdeploy.profiler.schema import Clock, Samples, Scenario, Stopped, Timed
from litdeploy.runtime import Runner

Call = Callable[[], object]

# What the timer itself takes is the median of so many calls that do nothing.
_EMPTY_CALLS = 101


@dataclass(frozen=True, slots=True)
class Reading:
    """One timed call.

    Attributes:
        start_seconds: when the host made it, by the stopwatch's `now`.
        milliseconds: that it took.
        launch_ms: host time until it returned, where the device runs on by itself; None where `milliseconds` is that.
        cpu_ms: processor time of all threads of this process meanwhile, on the host's clock; None on the device's.
    """

    start_seconds: float
    milliseconds: float
    launch_ms: float | None = None
    cpu_ms: float | None = None


class Stopwatch(Protocol):
    """What times calls.

    Attributes:
        clock: see `timing.Timed`.
        at_once: blocks of calls that are best timed between two looks at the clock.
    """

    clock: Clock
    at_once: int

    def now(self) -> float:
        """Seconds on the host, from some beginning."""
        ...

    def sleep(self, seconds: float) -> None:
        """Lets the host wait."""
        ...

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        ...

    def time(self, calls: Sequence[Call], before: Call | None = None) -> list[Reading]:
        """Times calls one after the other.

        Args:
            before: is called before each of them, untimed.
        """
        ...


class WallStopwatch:
    """The host's clock round each call, for calls that return when they are done.

    Args:
        now_ns: nanoseconds from some beginning, never running backwards.
        sleep: for so many seconds.
        cpu_ns: nanoseconds of processor time that this process has had.
    """

    clock: Clock = "wall"
    at_once = 1

    def __init__(
        self,
        now_ns: Callable[[], int] = time.perf_counter_ns,
        sleep: Callable[[float], None] = time.sleep,
        cpu_ns: Callable[[], int] = time.process_time_ns,
    ) -> None:
        self._now_ns, self._cpu_ns = now_ns, cpu_ns
        self.sleep = sleep

    def now(self) -> float:
        """See `Stopwatch.now`."""
        return self._now_ns() / 1e9

    def wait(self) -> None:
        """There is nothing to wait for."""

    def time(self, calls: Sequence[Call], before: Call | None = None) -> list[Reading]:
        """See `Stopwatch.time`."""
        now_ns, cpu_ns, readings = self._now_ns, self._cpu_ns, []
        for call in calls:
            if before is not None:
                before()
            worked = cpu_ns()
            start = now_ns()
            call()
            end = now_ns()
            readings.append(Reading(start / 1e9, (end - start) / 1e6, cpu_ms=(cpu_ns() - worked) / 1e6))
        return readings


class DeviceStopwatch:
    """Two events on the current stream round each call, recorded ahead and read after one wait for the device.

    Waiting after each call would put the launch of the next one, which a busy device hides, into every sample.
    """

    clock: Clock = "device"
    at_once = 8
    sleep = staticmethod(time.sleep)

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> float:
        """See `Stopwatch.now`."""
        return time.perf_counter()

    def wait(self) -> None:
        """See `Stopwatch.wait`."""
        torch.cuda.synchronize(self._device)

    def time(self, calls: Sequence[Call], before: Call | None = None) -> list[Reading]:
        """See `Stopwatch.time`. What `before` puts on the stream is done before the first event."""
        stream = torch.cuda.current_stream(self._device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * len(calls))]  # type: ignore[no-untyped-call]
        pairs = list(zip(events[::2], events[1::2], strict=True))
        launches = []
        for call, (start, end) in zip(calls, pairs, strict=True):
            if before is not None:
                before()
            start.record(stream)
            launched = time.perf_counter_ns()
            call()
            returned = time.perf_counter_ns()
            end.record(stream)
            launches.append((launched, returned))
        self.wait()
        return [
            Reading(launched / 1e9, start.elapsed_time(end), (returned - launched) / 1e6)
            for (launched, returned), (start, end) in zip(launches, pairs, strict=True)
        ]


def stopwatch_of(device: torch.device) -> Stopwatch:
    """The stopwatch for calls that run on that device."""
    return DeviceStopwatch(device) if device.type == "cuda" else WallStopwatch()


def overhead_ms(stopwatch: Stopwatch) -> float:
    """What the stopwatch measures of a call that does nothing: the median of many."""
    taken = sorted(reading.milliseconds for reading in stopwatch.time([lambda: None] * _EMPTY_CALLS))
    return taken[_EMPTY_CALLS // 2]


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
        with ConditionsMonitor(device_of(batch)) as monitor:
            order, readings, stopped = _alternate(
                calls, stopwatch, timing, before, monitor, deadline=started + timing.max_seconds, seed=seed
            )
    sides = {side: _samples(first[side], readings, order, side) for side in calls}
    starts = tuple((reading.start_seconds - readings[0].start_seconds) * 1e3 for reading in readings)
    return Timed(stopwatch.clock, order, starts, sides["T"], sides["S"], stopped, overhead, monitor.conditions)


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
    monitor: ConditionsMonitor,
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
            monitor.sample()
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
