"""How long a call takes: two runners timed in turn, so that whatever else the machine does meets both alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from litdeploy.batch import Batch, device_of
from litdeploy.runtime import Runner
from litdeploy.target import Timing

Clock = Literal["wall", "device"]
Call = Callable[[], object]

# A block is one of these; each side has the same mean position in both, so that a steady drift cancels out.
_BLOCKS = ("TSST", "STTS")
_CALLS_A_SIDE_AND_BLOCK = 2

# Device events are read after one synchronisation for this many blocks: waiting after each would put the launch of the
# next call, which a busy device hides, into every sample.
_BLOCKS_A_SYNCHRONISATION = 8

_WARM_UP_WINDOW = 10  # calls whose median must agree with that of as many calls before them
_WARM_UP_AGREEMENT = 0.02
_WARM_UP_SHARE = 0.1  # of `max_seconds`, for each side: a noisy machine never settles


@dataclass(frozen=True)
class Samples:
    """One side's times.

    Attributes:
        first_run_ms: the very first call with this batch, in milliseconds; compiles, plans or allocates.
        milliseconds: one a timed call, in the order in which they were made.
    """

    first_run_ms: float
    milliseconds: tuple[float, ...]


@dataclass(frozen=True)
class Timed:
    """Both sides' times.

    Attributes:
        clock: `wall` (the host's clock round each call) or `device` (between two events on the device).
        order: T (teacher) or S (student) for each timed call; blocks of four, two calls a side.
        teacher, student: as many samples each.
    """

    clock: Clock
    order: str
    teacher: Samples
    student: Samples


def measure(teacher: Runner, student: Runner, batch: Batch, timing: Timing, seed: int = 0) -> Timed:
    """Times two runners in turn on one batch, in randomised blocks TSST or STTS.

    Args:
        teacher, student: on the batch's device.
        batch: what they take.
        timing: how long to warm up, how many samples a side (rounded up to whole blocks), and the limit on the time
            from after the first run, which may compile. At least one block is timed whatever the limit.
        seed: of the blocks' order.

    Raises:
        RunnerError: a runner cannot run this batch.
    """
    on_cuda = device_of(batch).type == "cuda"
    clock = _device_ms if on_cuda else _wall_ms
    calls: dict[str, Call] = {"T": lambda: teacher.run(batch), "S": lambda: student.run(batch)}
    with torch.no_grad():
        first = {side: _first_run_ms(call, device_of(batch)) for side, call in calls.items()}
        started = time.perf_counter()
        for call in calls.values():
            _warm_up(call, clock, timing)
        order, milliseconds = _alternate(
            calls,
            clock,
            timing,
            deadline=started + timing.max_seconds,
            group=_BLOCKS_A_SYNCHRONISATION if on_cuda else 1,
            seed=seed,
        )
    sides = {
        side: Samples(first[side], tuple(ms for made, ms in zip(order, milliseconds, strict=True) if made == side))
        for side in calls
    }
    return Timed("device" if on_cuda else "wall", order, sides["T"], sides["S"])


def _first_run_ms(call: Call, device: torch.device) -> float:
    start = time.perf_counter_ns()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - start) / 1e6


def _warm_up(call: Call, clock: Callable[[Sequence[Call]], list[float]], timing: Timing) -> None:
    """Calls until `warmup_ms` are over and the median of the last calls settled, or a share of `max_seconds` is up."""
    start = time.perf_counter()
    enough = timing.warmup_ms / 1e3
    limit = max(enough, _WARM_UP_SHARE * timing.max_seconds)
    before = float("inf")
    while True:
        window: list[float] = []
        while len(window) < _WARM_UP_WINDOW:
            window += clock([call])
            if time.perf_counter() - start > limit:
                return
        now = median(window)
        settled = abs(now - before) <= _WARM_UP_AGREEMENT * before
        if settled and time.perf_counter() - start >= enough:
            return
        before = now


def _alternate(
    calls: dict[str, Call],
    clock: Callable[[Sequence[Call]], list[float]],
    timing: Timing,
    deadline: float,
    group: int,
    seed: int,
) -> tuple[str, list[float]]:
    """Order and times of all timed calls; `group` blocks are timed between two looks at the clock."""
    blocks = -(-timing.samples // _CALLS_A_SIDE_AND_BLOCK)
    generator = random.Random(seed)
    order = ""
    milliseconds: list[float] = []
    with _no_garbage_collection():
        while blocks > 0:
            now = "".join(generator.choice(_BLOCKS) for _ in range(min(group, blocks)))
            milliseconds += clock([calls[side] for side in now])
            order += now
            blocks -= group
            if time.perf_counter() > deadline:
                break
    return order, milliseconds


def _wall_ms(calls: Sequence[Call]) -> list[float]:
    """Milliseconds of each call by the host's clock."""
    times = []
    for call in calls:
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return times


def _device_ms(calls: Sequence[Call]) -> list[float]:
    """Milliseconds of each call between two events on the device, all read after one synchronisation."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * len(calls))]  # type: ignore[no-untyped-call]
    for call, start, end in zip(calls, events[::2], events[1::2], strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(events[::2], events[1::2], strict=True)]


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
