from __future__ import annotations

import pytest
import torch

from litdeploy.config.target import Timing
from litdeploy.profiler.measure.scenarios import cache_bytes, preparation, scenario_of
from litdeploy.profiler.measure.stopwatch import WallStopwatch

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("timing", "scenario"),
    [(Timing(), "warm"), (Timing(cold_cache=True), "cold cache"), (Timing(pace=10.0), "paced")],
)
def test_scenario(timing: Timing, scenario: str) -> None:
    assert scenario_of(timing) == scenario


def test_warm_calls_are_not_prepared() -> None:
    assert preparation(Timing(), CPU, WallStopwatch()) is None


def test_more_is_written_than_the_last_cache_holds() -> None:
    before = preparation(Timing(cold_cache=True), CPU, WallStopwatch())
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

    before = preparation(Timing(pace=10.0), CPU, WallStopwatch(lambda: now[0], sleep))
    assert before is not None
    for work in (0.03, 0.45, 0.01, 0.0):
        before()
        now[0] += round(work * 1e9)
    # At 0, at 0.1, late at 0.55, and from there at even times again: at 0.65 and 0.75.
    before()
    assert slept == [0.07, 0.09, 0.1]
