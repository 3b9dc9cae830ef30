from __future__ import annotations

import pytest

from litdeploy.config.target import Target, Timing
from litdeploy.errors import RunnerError, SettingsError, StudentError
from litdeploy.networks import new
from litdeploy.profiler import predict
from litdeploy.profiler.schema import Prediction

from .conftest import Made

TIMING = Timing(warmup_ms=1, samples=16, max_seconds=1)
TARGET = Target(device="cpu", runners=("eager", "onnxruntime"), batch_sizes=(1, 2), timing=TIMING)


def test_students_that_are_not_trained_are_timed_in_every_runner(made: Made) -> None:
    lines: list[str] = []
    prediction = predict(made.teacher, [14, 8, 8], target=TARGET, progress=lines.append)
    assert prediction.teacher == "ResNet-14"
    assert [(student.name, student.depth) for student in prediction.students] == [("ResNet-8", 8), ("ResNet-14", 14)]
    shallow, whole = prediction.students
    assert shallow.plan == {"layer1": (0,), "layer2": (0,), "layer3": (0,)}
    assert whole.flop_ratio == whole.depth_ratio == 1
    assert shallow.flop_ratio > 1.5
    for student in prediction.students:
        assert not student.failures
        assert [(each.runner, each.batch_size) for each in student.measurements] == [
            (runner, size) for runner in TARGET.runners for size in TARGET.batch_sizes
        ]
    [exported] = {each.student.artefact for each in shallow.measurements if each.runner == "onnxruntime"}
    assert exported is not None
    assert shallow.measurements[-1].student.build_seconds is not None
    assert any("ResNet-8, not trained" in line for line in lines)
    assert Prediction.model_validate_json(prediction.model_dump_json()) == prediction


def test_a_network_in_memory_serves_too() -> None:
    teacher = new("resnet,depth=14,width=4", normalise="none", input_shape=(3, 8, 8), classes=10, seed=0)
    target = TARGET.model_copy(update={"runners": ("eager",), "batch_sizes": (1,)})
    [student] = predict(teacher, [8], target=target, pace=500.0).students
    assert student.measurements[0].scenario == "paced"


def test_depths_that_there_are_not(made: Made) -> None:
    with pytest.raises(StudentError, match=r"Possible: 8, 14"):
        predict(made.teacher, [8, 9], target=TARGET)
    with pytest.raises(StudentError, match=r"--student-depth 8,14,20"):
        predict(made.teacher, [], target=TARGET)
    with pytest.raises(SettingsError, match="--processes"):
        predict(made.teacher, [8], target=TARGET, processes=3)


def test_nothing_that_can_run(made: Made) -> None:
    with pytest.raises(RunnerError, match="tensorrt"):
        predict(made.teacher, [8], target=TARGET.model_copy(update={"runners": ("tensorrt",)}))
