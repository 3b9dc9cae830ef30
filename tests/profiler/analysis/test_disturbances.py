from __future__ import annotations

from typing import Any

import pytest

from litdeploy.profiler.analysis.disturbances import disturbances
from litdeploy.profiler.schema import Conditions, Gpu, Measurement, RawSamples, Samples, Timed
from tests.profiler.conftest import measurement

QUIET = Conditions(seconds=2.0, cores=(0,), other_load=0.01, stolen=0.0, preemptions=2)


def under(conditions: Conditions, batch_size: int = 1, **fields: Any) -> Measurement:
    made = measurement("eager", batch_size, 2.0, 1.0)
    return made.model_copy(update={"conditions": conditions, **fields})


def raw(teacher: list[float], student: list[float], starts: list[float]) -> RawSamples:
    timed = Timed(
        clock="wall",
        order="TSST" * (len(teacher) // 2),
        starts_ms=tuple(starts),
        teacher=Samples(1.0, tuple(teacher)),
        student=Samples(1.0, tuple(student)),
        stopped="samples",
        overhead_ms=0.0,
        conditions=QUIET,
    )
    return RawSamples(runner="eager", batch_size=1, timed=timed)


def test_nothing_is_said_of_a_quiet_machine() -> None:
    steady = raw([2.0] * 16, [1.0] * 16, [float(number) for number in range(32)])
    assert not list(disturbances([under(QUIET)], [steady]))


def test_the_worst_neighbour_is_told_once() -> None:
    busy = QUIET.model_copy(update={"other_load": 0.4, "preemptions": 1_234})
    worse = QUIET.model_copy(update={"other_load": 0.7, "stolen": 0.1})
    [finding] = disturbances([under(busy), under(worse, 8), under(QUIET, 64)], [])
    assert (finding.kind, finding.batch_size) == ("noisy neighbour", 8)
    assert finding.figures["other_load_cores"] == 0.7
    assert "70% of a core on the 1 core" in finding.sentence
    assert "the hypervisor gave 10%" in finding.sentence
    assert "2 of 3 measurements" in finding.sentence


def test_a_throttled_gpu() -> None:
    gpu = Gpu(
        clock_mhz=1200,
        clock_low_mhz=1100,
        max_clock_mhz=1980,
        memory_clock_mhz=2619,
        temperature_c=83,
        power_watts=700,
        throttle_reasons=("power cap",),
    )
    [finding] = disturbances([under(QUIET.model_copy(update={"gpu": gpu}))], [])
    assert finding.kind == "throttled"
    assert "(power cap): 1200 of 1980 MHz at 700 W and 83 °C" in finding.sentence
    free = gpu.model_copy(update={"throttle_reasons": ()})
    assert not list(disturbances([under(QUIET.model_copy(update={"gpu": free}))], []))


def test_a_used_up_quota() -> None:
    [finding] = disturbances([under(QUIET.model_copy(update={"quota_seconds": 0.5}))], [])
    assert finding.kind == "throttled"
    assert finding.figures["stopped_share"] == 0.25


@pytest.mark.parametrize(
    ("teacher", "student", "drifts"),
    [([2.0, 3.0], [1.0, 1.5], True), ([3.0, 2.0], [1.5, 1.0], True), ([2.0, 3.0], [1.0, 1.0], False)],
)
def test_drift_is_what_both_sides_have(teacher: list[float], student: list[float], drifts: bool) -> None:
    sides = [[first] * 8 + [second] * 8 for first, second in (teacher, student)]
    found = list(disturbances([under(QUIET)], [raw(*sides, [float(number) for number in range(32)])]))
    assert [finding.kind for finding in found] == ["drift"] * drifts


def test_behind_the_pace() -> None:
    starts = [20.0 * number for number in range(32)]
    calls = raw([2.0] * 16, [1.0] * 16, starts)
    assert not list(disturbances([under(QUIET, pace=50.0, scenario="paced")], [calls]))
    [finding] = disturbances([under(QUIET, pace=100.0, scenario="paced")], [calls])
    assert finding.figures == {"reached_per_second": pytest.approx(50), "asked_per_second": 100}
