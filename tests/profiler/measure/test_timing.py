from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from types import TracebackType
from typing import Self

import pytest
import torch
from torch import Tensor

from litdeploy.config.target import Timing
from litdeploy.networks import new
from litdeploy.profiler.measure.statistics import compare_sides, median_interval
from litdeploy.profiler.measure.timing import (
    Stopwatch,
    cache_bytes,
    device_times,
    overhead_ms,
    preparation,
    scenario_of,
    stopwatch_for,
    time_pair,
)
from litdeploy.profiler.schema import Timed
from litdeploy.runtime import Description, open_runner
from tests.profiler.simulated import Machine, Simulated


def test_what_is_done_before_a_call_is_not_timed() -> None:
    done = []
    readings = Stopwatch().time([lambda: done.append("call")] * 3, before=lambda: time.sleep(0.02))
    assert done == ["call"] * 3
    assert all(reading.milliseconds < 20 for reading in readings)
    starts = [reading.start_seconds for reading in readings]
    assert starts[2] - starts[0] >= 0.04


def test_processor_time_is_that_of_the_call() -> None:
    [working, asleep] = Stopwatch().time([lambda: sum(range(2_000_000)), lambda: time.sleep(0.02)])
    assert working.cpu_ms is not None
    assert asleep.cpu_ms is not None
    assert working.cpu_ms > asleep.cpu_ms
    assert asleep.cpu_ms < 20


def test_the_overhead_is_small_and_there() -> None:
    assert 0 < overhead_ms(Stopwatch()) < 0.1


def test_a_processor_is_timed_by_the_wall() -> None:
    assert stopwatch_for(torch.device("cpu")).clock == "wall"


@pytest.mark.gpu
def test_events_leave_the_host_out() -> None:
    stopwatch = stopwatch_for(torch.device("cuda", 0))
    matrix = torch.randn(4096, 4096, device="cuda")
    [reading] = stopwatch.time([lambda: matrix @ matrix])
    [slow] = stopwatch.time([lambda: time.sleep(0.05)], before=lambda: matrix.zero_())
    assert reading.milliseconds > 0
    assert reading.launch_ms is not None
    assert slow.launch_ms is not None
    assert slow.launch_ms >= 50


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("timing", "scenario"),
    [(Timing(), "warm"), (Timing(cold_cache=True), "cold cache"), (Timing(pace=10.0), "paced")],
)
def test_scenario(timing: Timing, scenario: str) -> None:
    assert scenario_of(timing) == scenario


def test_warm_calls_are_not_prepared() -> None:
    assert preparation(Timing(), CPU, Stopwatch()) is None


def test_more_is_written_than_the_last_cache_holds() -> None:
    before = preparation(Timing(cold_cache=True), CPU, Stopwatch())
    assert before is not None
    written = before()
    assert isinstance(written, torch.Tensor)
    assert written.nbytes == 2 * cache_bytes(CPU)
    assert cache_bytes(CPU) >= 2**18


def test_a_call_that_is_late_is_made_at_once_and_not_made_up_for() -> None:
    now = [0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))
        now[0] += round(seconds * 1e9)

    before = preparation(Timing(pace=10.0), CPU, Stopwatch(lambda: now[0], sleep))
    assert before is not None
    for work in (0.03, 0.45, 0.01, 0.0):
        before()
        now[0] += round(work * 1e9)
    # At 0, at 0.1, late at 0.55, and from there at regular times again: at 0.65 and 0.75.
    before()
    assert slept == [0.07, 0.09, 0.1]


class Sleeper:
    """A runner that sleeps, and appends each call to a list that it may share."""

    name = "sleeper"

    def __init__(self, letter: str, seconds: float, calls: list[str], device: str = "cpu") -> None:
        self.letter, self.seconds, self.calls = letter, seconds, calls
        self.device = torch.device(device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def run(self, batch_NCHW: Tensor) -> Tensor:
        self.calls.append(self.letter)
        time.sleep(self.seconds)
        return batch_NCHW.sum((2, 3))

    def describe(self) -> Description:
        return Description(self.name, str(self.device), "fp32", "asleep", {}, 0.0)


def pair(calls: list[str], teacher: float, student: float) -> tuple[Sleeper, Sleeper]:
    return Sleeper("T", teacher, calls), Sleeper("S", student, calls)


BATCH = torch.zeros(1, 1, 2, 2)


class Diary(Sleeper):
    """A sleeper that records the duration of each of its sleeps."""

    def run(self, batch_NCHW: Tensor) -> Tensor:
        start = time.perf_counter_ns()
        time.sleep(self.seconds)
        self.slept.append((time.perf_counter_ns() - start) / 1e6)
        return batch_NCHW

    def __init__(self, seconds: float) -> None:
        super().__init__("", seconds, [])
        self.slept: list[float] = []


def test_a_runner_that_sleeps_is_measured_as_long_as_it_slept() -> None:
    """A sleep of 5 ms takes as long as the machine decides; the profiler may add at most 2 % of 5 ms to it."""
    teacher, student = Diary(0.005), Diary(0.001)
    timed = time_pair(teacher, student, BATCH, Timing(warmup_ms=0, samples=32, max_seconds=5))
    assert timed.clock == "wall"
    assert min(timed.teacher.milliseconds) >= 5
    assert timed.teacher.first_run_ms >= 5
    added = [
        measured - slept
        for measured, slept in zip(
            timed.teacher.milliseconds, teacher.slept[-len(timed.teacher.milliseconds) :], strict=True
        )
    ]
    assert 0 <= statistics.median(added) < 0.02 * 5
    # The timer reports its own overhead.
    assert 0 < timed.overhead_ms < 0.02 * 5
    # Asleep it used no processor time.
    assert statistics.median(timed.teacher.cpu_ms) < 1


SETTLING = Timing(warmup_ms=50, half_width=0.01, min_samples=64, min_seconds=0, samples=400, max_seconds=1_000)
MACHINES = {
    "quiet": {"noise": 0.02},
    "wandering": {"noise": 0.03, "wander": 0.05},
    "drifting": {"noise": 0.02, "drift": 2.0},
    "interrupted": {"noise": 0.03, "wander": 0.03, "spikes": 0.1},
}


@pytest.fixture
def _quick_collection() -> Iterator[None]:
    """Each measurement collects garbage before it begins; freeze the objects of all libraries to make that fast."""
    gc.freeze()
    yield
    gc.unfreeze()


def simulated(seed: int, ratio: float, timing: Timing = SETTLING, **machine: float) -> Timed:
    """A program of 5 ms, and one that takes `ratio` times as long, measured on a simulated machine."""
    on = Machine(seed, **machine)
    sides = Simulated(on, 0.005 * ratio), Simulated(on, 0.005)
    return time_pair(*sides, BATCH, timing, seed=seed, stopwatch=on.stopwatch)


@pytest.mark.usefixtures("_quick_collection")
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, "same"), (1.06, "faster"), (1 / 1.06, "slower")])
def test_what_is_said_of_programs_on_a_computed_machine(machine: str, ratio: float, verdict: str) -> None:
    """Over 1,000 seeds, each machine gave `same` for a program compared with itself every time."""
    said = []
    for seed in range(20):
        timed = simulated(seed, ratio, **MACHINES[machine])
        said.append(compare_sides(timed.teacher.milliseconds, timed.student.milliseconds).verdict)
    assert said.count(verdict) >= 19


def test_ends_when_the_medians_are_known_well_enough() -> None:
    quiet = simulated(1, 2.0, noise=0.02)
    assert quiet.stopped == "settled"
    assert len(quiet.teacher.milliseconds) == 64
    for side in (quiet.teacher, quiet.student):
        interval = median_interval(side.milliseconds)
        assert interval is not None
        assert interval[1] - interval[0] <= 0.02 * statistics.median(side.milliseconds) * 1.01
    noisy = simulated(1, 2.0, noise=0.02, wander=0.2)
    assert noisy.stopped == "samples"
    assert len(noisy.teacher.milliseconds) == 400
    late = simulated(1, 2.0, SETTLING.model_copy(update={"max_seconds": 3.0}), noise=0.02, wander=0.2)
    assert late.stopped == "time limit"
    never = simulated(1, 2.0, SETTLING.model_copy(update={"half_width": 0.0}), noise=0.02)
    assert never.stopped == "samples"


def test_takes_its_least_time_even_when_it_is_settled() -> None:
    timed = simulated(1, 1.0, SETTLING.model_copy(update={"min_seconds": 1.5}), noise=0.02)
    assert timed.stopped == "settled"
    assert timed.starts_ms[0] == 0
    assert timed.starts_ms[-1] >= 1_400
    assert list(timed.starts_ms) == sorted(timed.starts_ms)


def test_paced_calls_begin_at_even_times() -> None:
    timing = Timing(warmup_ms=0, samples=16, max_seconds=1_000, pace=50.0)
    timed = simulated(1, 1.0, timing)
    gaps = [after - before for before, after in pairwise(timed.starts_ms)]
    assert gaps == pytest.approx([20.0] * len(gaps), rel=0.01)
    behind = simulated(1, 1.0, timing.model_copy(update={"pace": 500.0}))
    assert statistics.median(after - before for before, after in pairwise(behind.starts_ms)) >= 5


def test_the_sides_alternate_in_blocks_of_both_orders() -> None:
    calls: list[str] = []
    timed = time_pair(*pair(calls, 0, 0), BATCH, Timing(warmup_ms=0, samples=64, max_seconds=5))
    blocks = [timed.order[index : index + 4] for index in range(0, len(timed.order), 4)]
    assert set(blocks) == {"TSST", "STTS"}
    assert len(timed.teacher.milliseconds) == len(timed.student.milliseconds) == 64
    assert "".join(calls).endswith(timed.order)  # the reported order is the real one


def test_the_order_is_the_same_for_the_same_seed() -> None:
    timing = Timing(warmup_ms=0, samples=64, max_seconds=5)
    orders = [time_pair(*pair([], 0, 0), BATCH, timing, seed=seed).order for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_samples_keep_the_order_in_which_they_were_taken() -> None:
    teacher, student = Diary(0), Diary(0)
    run = teacher.run

    def longer_each_time(batch_NCHW: Tensor) -> Tensor:
        teacher.seconds += 0.0005
        return run(batch_NCHW)

    teacher.run = longer_each_time  # type: ignore[method-assign]
    times = time_pair(teacher, student, BATCH, Timing(warmup_ms=0, samples=8, max_seconds=10)).teacher.milliseconds
    slept = teacher.slept[-len(times) :]
    # A sample includes its sleep, however long the machine delays both.
    assert all(time >= asleep for time, asleep in zip(times, slept, strict=True))


def test_one_block_is_timed_whatever_the_limit() -> None:
    timed = time_pair(*pair([], 0.002, 0.002), BATCH, Timing(warmup_ms=0, samples=1000, max_seconds=0.001))
    assert len(timed.order) == 4
    assert len(timed.teacher.milliseconds) == 2


def test_warms_up_for_as_long_as_it_is_told() -> None:
    calls: list[str] = []
    time_pair(*pair(calls, 0.001, 0.001), BATCH, Timing(warmup_ms=50, samples=8, max_seconds=0.1))
    warm = "".join(calls)[2:-16]
    assert warm == "T" * warm.count("T") + "S" * warm.count("S")
    assert min(warm.count("T"), warm.count("S")) > 2


@pytest.mark.gpu
def test_device_time_leaves_the_host_out() -> None:
    calls: list[str] = []
    batch = torch.randn(8, 3, 256, 256, device="cuda")
    teacher, student = Sleeper("T", 0, calls, "cuda"), Sleeper("S", 0, calls, "cuda")
    timed = time_pair(teacher, student, batch, Timing(warmup_ms=20, samples=40, max_seconds=5))
    assert timed.clock == "device"
    assert len(timed.teacher.milliseconds) == len(timed.student.milliseconds) == 40
    assert min(timed.teacher.milliseconds) > 0


NETWORK = new("resnet20", normalise="none", input_shape=(3, 32, 32), classes=10, seed=0)


def test_a_processor_copies_and_captures_nothing() -> None:
    with open_runner("eager", network=NETWORK, device=torch.device("cpu")) as runner:
        assert device_times(runner, NETWORK.example(2)) == {}


@pytest.mark.gpu
def test_the_whole_way_is_longer_than_its_parts() -> None:
    device = torch.device("cuda", 0)
    with open_runner("eager", network=NETWORK, device=device) as runner:
        found = device_times(runner, NETWORK.example(64).to(device))
    assert found["copy_in_ms"] is not None
    assert found["copy_out_ms"] is not None
    assert found["end_to_end_ms"] is not None
    assert found["end_to_end_ms"] > found["copy_in_ms"] + found["copy_out_ms"]
    assert found["captured_ms"] is not None
    assert 0 < found["captured_ms"] < found["end_to_end_ms"]
