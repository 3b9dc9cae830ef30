"""Clocks that time calls: the host's, and the device's own between two events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from litdeploy.profiler.schema import Clock

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
