from __future__ import annotations

import pytest
from torch import nn

from litdeploy.config.target import Target, Timing
from litdeploy.errors import RunnerError, SettingsError
from litdeploy.profiler import profile
from litdeploy.profiler.measure.processes import measure_in_processes, merge
from litdeploy.profiler.measure.runners import Results
from litdeploy.profiler.schema import Conditions, Failure, RawSamples, Samples, Timed
from tests.profiler.conftest import Made, measurement


def results(teacher_ms: float, student_ms: float, stopped: str = "settled", load: float = 0.0) -> Results:
    conditions = Conditions(seconds=1.0, other_load=load, preemptions=1)
    made = measurement("eager", 1, teacher_ms, student_ms)
    made = made.model_copy(update={"stopped": stopped, "conditions": conditions})
    timed = Timed(
        clock="wall",
        order="TSST" * 40,
        starts_ms=tuple(float(number) for number in range(160)),
        teacher=Samples(1.0, (teacher_ms,) * 80),
        student=Samples(1.0, (student_ms,) * 80),
        stopped="settled",
        overhead_ms=0.0,
        conditions=conditions,
    )
    return Results([made], [RawSamples(runner="eager", batch_size=1, timed=timed)])


def test_the_spread_between_processes_is_in_the_intervals() -> None:
    merged = merge([results(2.0, 1.0), results(2.2, 1.0, "time limit", load=0.5), results(1.8, 1.0)])
    [one] = merged.measurements
    assert one.comparison.processes == pytest.approx((2.0, 2.2, 1.8))
    assert one.comparison.speedup == pytest.approx((2.0 * 2.2 * 1.8) ** (1 / 3))
    low, high = one.comparison.speedup_low, one.comparison.speedup_high
    assert low is not None
    assert high is not None
    assert low < 1.8
    assert high > 2.2
    assert one.comparison.verdict == "faster"
    assert one.teacher.samples == 240
    assert one.teacher.median_low_ms is not None
    assert one.teacher.median_low_ms < 1.8
    assert one.stopped == "time limit"
    assert (one.conditions.other_load, one.conditions.preemptions, one.conditions.seconds) == (0.5, 3, 3.0)
    assert [raw.process for raw in merged.samples] == [0, 1, 2]


def test_what_one_process_could_not_measure_is_a_failure_of_all() -> None:
    failure = Failure(runner="eager", batch_size=1, message="out of memory")
    merged = merge([results(2.0, 1.0), Results(failures=[failure])])
    assert merged.failures == [failure]
    assert not merged.measurements
    assert not merge([Results(failures=[failure]), results(2.0, 1.0)]).measurements


SHORT = Timing(warmup_ms=1, samples=16, max_seconds=2, processes=2)
TARGET = Target(device="cpu", runners=("eager", "onnxruntime"), batch_sizes=(1,), timing=SHORT)


def test_each_process_has_its_speedup_and_its_samples(made: Made) -> None:
    lines: list[str] = []
    report = profile(made.bundle, target=TARGET, progress=lines.append)
    [measured] = report.measurements
    assert len(measured.comparison.processes) == 2
    low, high = measured.comparison.speedup_low, measured.comparison.speedup_high
    assert low is not None
    assert high is not None
    assert low <= min(measured.comparison.processes) <= max(measured.comparison.processes) <= high
    assert measured.student.samples == 32
    assert [failure.runner for failure in report.failures] == ["onnxruntime"]
    assert "process 2 of 2" in lines
    assert report.commands[-1].endswith("--processes 2")
    content = (made.bundle.profile_path / "samples.json").read_text(encoding="utf-8")
    assert '"process": 1' in content


def test_a_fresh_process_must_be_able_to_import_the_network(made: Made) -> None:
    class Local(nn.Module):
        pass

    for network in (Local, Local(), lambda: Local()):
        with pytest.raises(SettingsError, match=r"package\.module:function"):
            measure_in_processes(made.bundle, str(made.teacher), TARGET, network, print)


def test_what_a_process_could_not_begin_is_told(made: Made) -> None:
    made.teacher.unlink()
    with pytest.raises(RunnerError, match="no such file"):
        measure_in_processes(made.bundle, str(made.teacher), TARGET, None, lambda line: None)
