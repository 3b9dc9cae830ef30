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
from typing import Any

import torch
from torch import Tensor

from litdeploy.batch import Batch, device_of, mapped, tensors_of
from litdeploy.config.target import Timing
from litdeploy.profiler.machine.conditions import ConditionsMonitor, Nvml, open_nvml
from litdeploy.profiler.measure.memory_meter import MemoryMeter
from litdeploy.profiler.measure.statistics import median_interval
from litdeploy.profiler.schema import Clock, Samples, Scenario, Stopped, Timed
from litdeploy.runtime import Runner

# A block is one of these; each side has the same mean position in both, so that a steady drift cancels out.
_BLOCKS = ("TSST", "STTS")
_CALLS_A_SIDE_AND_BLOCK = 2

_WARM_UP_WINDOW = 10  # calls whose median must agree with that of the window before
_WARM_UP_AGREEMENT = 0.02
_WARM_UP_SHARE = 0.1  # of `max_seconds`, for each side: a noisy machine never settles

# The intervals are checked again after this factor more samples: checking after each block would stop the measurement
# at a moment when they happen to be narrow.
_CHECK_AGAIN = 1.25

_EMPTY_CALLS = 101  # the timer's own overhead is the median of this many calls that do nothing

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_CACHE_IF_UNKNOWN = 64 * 2**20
_TIMES_THE_CACHE = 2

_DEVICE_CALLS = 64
_DEVICE_SECONDS = 1.0  # time limit for each of the device's times
# NVML's energy counter advances every 20 to 100 ms; over this long, one step more or less hardly matters.
_ENERGY_SECONDS = 1.0
# Runners that only queue their work on the current stream, so that it can be captured.
_CAPTURABLE = ("eager", "compiled", "inductor")


@dataclass(frozen=True, slots=True)
class CallTime:
    """One timed call.

    Attributes:
        start_seconds: when the host made it, on the stopwatch's `now`.
        milliseconds: how long it took.
        launch_ms: host time until it returned, if the device runs asynchronously; None if that is `milliseconds`.
        cpu_ms: processor time of all threads of this process meanwhile, on the host's clock; None on the device's.
    """

    start_seconds: float
    milliseconds: float
    launch_ms: float | None = None
    cpu_ms: float | None = None


class Stopwatch:
    """The host's clock around each call, for calls that return when they are finished.

    Args:
        now_ns: monotonic time in nanoseconds.
        sleep: sleeps for a number of seconds.
        cpu_ns: processor time of this process in nanoseconds.

    Attributes:
        clock: see `schema.Timed`.
        blocks_per_wait: how many blocks of calls are best timed between two waits for the device.
    """

    clock: Clock = "wall"
    blocks_per_wait = 1

    def __init__(
        self,
        now_ns: Callable[[], int] = time.perf_counter_ns,
        sleep: Callable[[float], None] = time.sleep,
        cpu_ns: Callable[[], int] = time.process_time_ns,
    ) -> None:
        self._now_ns, self._cpu_ns = now_ns, cpu_ns
        self.sleep = sleep

    def now(self) -> float:
        """Host time in seconds, from an arbitrary origin."""
        return self._now_ns() / 1e9

    def wait(self) -> None:
        """Wait until the device has finished its queued work."""

    def time(self, calls: Sequence[Callable[[], object]], before: Callable[[], object] | None = None) -> list[CallTime]:
        """Time calls one after the other.

        Args:
            before: called before each of them, untimed; on a device, its queued work is not timed either.
        """
        now_ns, cpu_ns, times = self._now_ns, self._cpu_ns, []
        for call in calls:
            if before is not None:
                before()
            worked = cpu_ns()
            start = now_ns()
            call()
            end = now_ns()
            times.append(CallTime(start / 1e9, (end - start) / 1e6, cpu_ms=(cpu_ns() - worked) / 1e6))
        return times


class DeviceStopwatch(Stopwatch):
    """Two CUDA events around each call, recorded ahead and read after one wait for the device.

    Waiting after each call would add the launch of the next one, which a busy device hides, to every sample.
    """

    clock: Clock = "device"
    blocks_per_wait = 8

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def time(self, calls: Sequence[Callable[[], object]], before: Callable[[], object] | None = None) -> list[CallTime]:
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
            CallTime(launched / 1e9, start.elapsed_time(end), (returned - launched) / 1e6)
            for (launched, returned), (start, end) in zip(launches, pairs, strict=True)
        ]


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The stopwatch for calls that run on a device."""
    return DeviceStopwatch(device) if device.type == "cuda" else Stopwatch()


def overhead_ms(stopwatch: Stopwatch) -> float:
    """The stopwatch's own overhead: the median time of many calls that do nothing."""
    return median(each.milliseconds for each in stopwatch.time([lambda: None] * _EMPTY_CALLS))


def time_pair(
    teacher: Runner,
    student: Runner,
    batch: Batch,
    timing: Timing,
    seed: int = 0,
    stopwatch: Stopwatch | None = None,
    memory: Sequence[MemoryMeter] | None = None,
) -> Timed:
    """Time two runners in turn on one batch, in random blocks TSST or STTS, until both medians are known or a limit.

    Args:
        teacher, student: on the batch's device.
        timing: warm-up, limits and scenario; `max_seconds` counts from after the first run, which may compile. At
            least one block is timed, whatever the limit.
        seed: of the blocks' order.
        stopwatch: None: the one for the batch's device.
        memory: the meters that the first runs of teacher and student are charged to.

    Raises:
        RunnerError: a runner cannot run this batch.
    """
    device = device_of(batch)
    stopwatch = stopwatch or stopwatch_for(device)
    calls: dict[str, Callable[[], object]] = {"T": lambda: teacher.run(batch), "S": lambda: student.run(batch)}
    with torch.no_grad():
        meters = memory or (MemoryMeter(device), MemoryMeter(device))
        first_runs_ms = {
            side: _first_run_ms(call, stopwatch, meter)
            for (side, call), meter in zip(calls.items(), meters, strict=True)
        }
        deadline = stopwatch.now() + timing.max_seconds
        before = preparation(timing, device, stopwatch)
        for call in calls.values():
            _warm_up(call, stopwatch, timing)
        overhead = overhead_ms(stopwatch)
        with ConditionsMonitor(device) as monitor:
            order, times, stopped = _alternate(calls, stopwatch, timing, before, monitor, deadline=deadline, seed=seed)
    sides = {side: _samples(first_runs_ms[side], times, order, side) for side in calls}
    starts = tuple((each.start_seconds - times[0].start_seconds) * 1e3 for each in times)
    return Timed(stopwatch.clock, order, starts, sides["T"], sides["S"], stopped, overhead, monitor.conditions)


def _first_run_ms(call: Callable[[], object], stopwatch: Stopwatch, meter: MemoryMeter) -> float:
    """Host time of a call until the device has finished it."""
    with meter.charge():
        start = stopwatch.now()
        call()
        stopwatch.wait()
        return (stopwatch.now() - start) * 1e3


def _samples(first_run_ms: float, times: list[CallTime], order: str, side: str) -> Samples:
    mine = [each for each, letter in zip(times, order, strict=True) if letter == side]
    return Samples(
        first_run_ms,
        tuple(each.milliseconds for each in mine),
        tuple(each.launch_ms for each in mine if each.launch_ms is not None),
        tuple(each.cpu_ms for each in mine if each.cpu_ms is not None),
    )


def _warm_up(call: Callable[[], object], stopwatch: Stopwatch, timing: Timing) -> None:
    """Call for at least `warmup_ms` and until the median of a window settles, or a share of `max_seconds` is over."""
    start = stopwatch.now()
    enough = timing.warmup_ms / 1e3
    limit = max(enough, _WARM_UP_SHARE * timing.max_seconds)
    before = float("inf")
    while True:
        window: list[float] = []
        while len(window) < _WARM_UP_WINDOW:
            window += [each.milliseconds for each in stopwatch.time([call])]
            if stopwatch.now() - start > limit:
                return
        now = median(window)
        settled = abs(now - before) <= _WARM_UP_AGREEMENT * before
        if settled and stopwatch.now() - start >= enough:
            return
        before = now


def _alternate(
    calls: dict[str, Callable[[], object]],
    stopwatch: Stopwatch,
    timing: Timing,
    before: Callable[[], object] | None,
    monitor: ConditionsMonitor,
    deadline: float,
    seed: int,
) -> tuple[str, list[CallTime], Stopped]:
    """Order and times of all timed calls, and why there are no more."""
    most = -(-timing.samples // _CALLS_A_SIDE_AND_BLOCK)
    generator = random.Random(seed)
    order = ""
    times: list[CallTime] = []
    settled = _Settled(timing, stopwatch.now)
    stopped: Stopped | None = None
    with _no_garbage_collection():
        while stopped is None:
            done = len(order) // 4
            block = "".join(generator.choice(_BLOCKS) for _ in range(min(stopwatch.blocks_per_wait, most - done)))
            times += stopwatch.time([calls[side] for side in block], before)
            order += block
            monitor.sample()
            if len(order) // 4 >= most:
                stopped = "samples"
            elif settled(order, times):
                stopped = "settled"
            elif stopwatch.now() > deadline:
                stopped = "time limit"
    return order, times, stopped


class _Settled:
    """Whether the intervals of both medians are as narrow as `half_width` requires."""

    def __init__(self, timing: Timing, now: Callable[[], float]) -> None:
        self._half_width = timing.half_width
        self._check_at = timing.min_samples
        self._now, self._not_before = now, now() + timing.min_seconds

    def __call__(self, order: str, times: list[CallTime]) -> bool:
        samples = len(order) // 2
        if not self._half_width or samples < self._check_at or self._now() < self._not_before:
            return False
        self._check_at = int(_CHECK_AGAIN * samples) + 1
        return all(
            _half_width([each.milliseconds for each, letter in zip(times, order, strict=True) if letter == side])
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
    """Collect now and not during the timed calls: a collection would be charged to whichever call triggers it."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def scenario_of(timing: Timing) -> Scenario:
    """How the calls are made."""
    if timing.cold_cache:
        return "cold cache"
    return "warm" if timing.pace is None else "paced"


def preparation(timing: Timing, device: torch.device, stopwatch: Stopwatch) -> Callable[[], object] | None:
    """The untimed action before each timed call; None for warm calls."""
    if timing.cold_cache:
        other = torch.empty(_TIMES_THE_CACHE * cache_bytes(device), dtype=torch.uint8, device=device)
        # Writing more than the last-level cache holds evicts everything else; torch does so on all of its threads.
        return other.zero_
    if timing.pace is not None:
        return _Pace(timing.pace, stopwatch)
    return None


class _Pace:
    """Waits until the next call is due. A late call is made at once, and the next ones count from it."""

    def __init__(self, calls_per_second: float, stopwatch: Stopwatch) -> None:
        self._interval, self._stopwatch = 1 / calls_per_second, stopwatch
        self._next = stopwatch.now()

    def __call__(self) -> None:
        self._stopwatch.wait()
        now = self._stopwatch.now()
        if now < self._next:
            self._stopwatch.sleep(self._next - now)
        self._next = max(self._next, now) + self._interval


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_parse_size(path.read_text()) for path in _CACHES.glob("index*/size")]
    return max(sizes, default=_CACHE_IF_UNKNOWN)


def _parse_size(text: str) -> int:
    """Parse `32768K`."""
    text = text.strip()
    factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:])
    return int(text[:-1]) * factor if factor else int(text)


def device_times(runner: Runner, batch: Batch) -> dict[str, Any]:
    """The fields of `schema.SideTiming` that CUDA adds: copies, end to end, replay as a CUDA graph, energy.

    Args:
        runner: warm, with nothing else running on the device.
        batch: on the runner's device.

    Returns:
        Field → value; empty on a CPU.
    """
    device = device_of(batch)
    if device.type != "cuda":
        return {}
    stopwatch = DeviceStopwatch(device)
    with torch.no_grad():
        output = tensors_of(runner.run(batch))
        on_host = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True).copy_(each) for each in tensors_of(batch)]
        host_output = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in output]
        on_device = mapped(torch.empty_like, batch)

        def copy_in() -> None:
            for target, source in zip(tensors_of(on_device), on_host, strict=True):
                target.copy_(source, non_blocking=True)

        def copy_out(tensors: list[Tensor]) -> None:
            for target, source in zip(host_output, tensors, strict=True):
                target.copy_(source, non_blocking=True)

        def end_to_end() -> None:
            copy_in()
            copy_out(tensors_of(runner.run(on_device)))
            stopwatch.wait()

        nvml = open_nvml(device)
        return {
            "copy_in_ms": _device_ms(stopwatch, copy_in),
            "copy_out_ms": _device_ms(stopwatch, lambda: copy_out(output)),
            "end_to_end_ms": _host_ms(stopwatch, end_to_end),
            "captured_ms": _captured_ms(stopwatch, runner, batch),
            "energy_joules": None if nvml is None else _joules(stopwatch, nvml, lambda: runner.run(batch)),
        }


def _device_ms(stopwatch: DeviceStopwatch, call: Callable[[], object]) -> float:
    return median(each.milliseconds for each in stopwatch.time([call] * _DEVICE_CALLS))


def _host_ms(stopwatch: DeviceStopwatch, call: Callable[[], None]) -> float:
    """Median host time of a call that waits for the device itself."""
    taken: list[float] = []
    stopwatch.wait()
    started = time.perf_counter()
    while len(taken) < _DEVICE_CALLS and time.perf_counter() - started < _DEVICE_SECONDS:
        start = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - start) / 1e6)
    return median(taken)


def _captured_ms(stopwatch: DeviceStopwatch, runner: Runner, batch: Batch) -> float | None:
    """Device time of the call as a CUDA graph; None if the runner does more than queue work, or capturing fails."""
    if runner.name not in _CAPTURABLE:
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            runner.run(batch)
    except RuntimeError:
        return None
    graph.replay()
    return _device_ms(stopwatch, graph.replay)


def _joules(stopwatch: DeviceStopwatch, nvml: Nvml, call: Callable[[], object]) -> float:
    """Energy of one call, averaged over many in a row."""
    stopwatch.wait()
    calls, before, started = 0, nvml.joules(), time.perf_counter()
    while time.perf_counter() - started < _ENERGY_SECONDS:
        for _ in range(stopwatch.blocks_per_wait):
            call()
        stopwatch.wait()
        calls += stopwatch.blocks_per_wait
    return (nvml.joules() - before) / calls
