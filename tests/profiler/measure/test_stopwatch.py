from __future__ import annotations

import time

import pytest
import torch

from litdeploy.profiler.measure.stopwatch import WallStopwatch, overhead_ms, stopwatch_of


def test_what_is_done_before_a_call_is_not_timed() -> None:
    done = []
    readings = WallStopwatch().time([lambda: done.append("call")] * 3, before=lambda: time.sleep(0.02))
    assert done == ["call"] * 3
    assert all(reading.milliseconds < 20 for reading in readings)
    starts = [reading.start_seconds for reading in readings]
    assert starts[2] - starts[0] >= 0.04


def test_processor_time_is_that_of_the_call() -> None:
    [working, asleep] = WallStopwatch().time([lambda: sum(range(2_000_000)), lambda: time.sleep(0.02)])
    assert working.cpu_ms is not None
    assert asleep.cpu_ms is not None
    assert working.cpu_ms > asleep.cpu_ms
    assert asleep.cpu_ms < 20


def test_the_overhead_is_small_and_there() -> None:
    assert 0 < overhead_ms(WallStopwatch()) < 0.1


def test_a_processor_is_timed_by_the_wall() -> None:
    assert isinstance(stopwatch_of(torch.device("cpu")), WallStopwatch)


@pytest.mark.gpu
def test_events_leave_the_host_out() -> None:
    stopwatch = stopwatch_of(torch.device("cuda", 0))
    matrix = torch.randn(4096, 4096, device="cuda")
    [reading] = stopwatch.time([lambda: matrix @ matrix])
    [slow] = stopwatch.time([lambda: time.sleep(0.05)], before=lambda: matrix.zero_())
    assert reading.milliseconds > 0
    assert reading.launch_ms is not None
    assert slow.launch_ms is not None
    assert slow.launch_ms >= 50
