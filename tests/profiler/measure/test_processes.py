from __future__ import annotations

import pytest
from torch import nn

from litdeploy.config.target import Target, Timing
from litdeploy.errors import RunnerError, SettingsError
from litdeploy.profiler import profile
from litdeploy.profiler.measure.processes import measure_in_processes
from tests.profiler.conftest import Made

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
