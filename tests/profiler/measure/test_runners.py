from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from litdeploy.config.target import Target, Timing
from litdeploy.errors import RunnerError
from litdeploy.exporter.formats import onnx as onnx_format
from litdeploy.exporter.teacher import load_teacher
from litdeploy.networks import Network, load
from litdeploy.profiler.measure.runners import Pair, Program, measure_runners, teacher_file
from litdeploy.storage.bundle import sidecar_of
from litdeploy.storage.records import Artefact
from tests.profiler.conftest import Made

TARGET = Target(
    device="cpu", runners=("eager",), batch_sizes=(1, 2, 4), timing=Timing(warmup_ms=1, samples=32, max_seconds=2)
)
CPU = torch.device("cpu")


class Head(nn.Module):
    """Sleeps, and refuses some batch sizes."""

    def __init__(self, seconds: float, refused: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.seconds, self.refused = seconds, refused
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        if len(images) in self.refused:
            raise RuntimeError(f"no room for {len(images)}\nat frame 7")
        time.sleep(self.seconds)
        return images.mean((2, 3)) * self.weight


def network(seconds: float, refused: tuple[int, ...] = ()) -> Network:
    return load(Head(seconds, refused), normalise="none", input_shape=(3, 4, 4))


def pair(teacher: Network, student: Network) -> Pair:
    return Pair(Program(teacher), Program(student))


def test_a_slowed_student_is_slower() -> None:
    """Asleep, neither side loses the core to other work, so the ratio is that of the modules."""
    results = measure_runners(lambda runner: pair(network(0.002), network(0.006)), TARGET, CPU, lambda line: None)
    assert [each.comparison.verdict for each in results.measurements] == ["slower"] * 3
    assert all(each.comparison.speedup < 0.7 for each in results.measurements)
    assert all(each.student.peak_memory_bytes is not None for each in results.measurements)


def test_a_batch_size_that_fails_is_left_out() -> None:
    lines: list[str] = []
    results = measure_runners(lambda runner: pair(network(0, (4,)), network(0)), TARGET, CPU, lines.append)
    assert [each.batch_size for each in results.measurements] == [1, 2]
    [failure] = results.failures
    assert (failure.runner, failure.batch_size) == ("eager", 4)
    assert failure.message == "RuntimeError: no room for 4"
    assert any("eager, batch 4: left out" in line for line in lines)
    results.check()


def test_where_nothing_can_be_measured_it_is_said_of_each_why() -> None:
    def none(runner: str) -> Pair:
        raise RunnerError("write another one")

    results = measure_runners(none, TARGET, CPU, lambda line: None)
    with pytest.raises(RunnerError, match=r"nothing could be measured.*\n  eager: write another one"):
        results.check()


def test_a_fault_of_ours_is_not_hidden() -> None:
    def wrong(runner: str) -> Pair:
        raise KeyError(runner)

    with pytest.raises(KeyError):
        measure_runners(wrong, TARGET, CPU, lambda line: None)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The operator sets that were exported, one an export."""
    done: list[int] = []

    def export_onnx(network: Network, path: Path, opset: int, **options: object) -> dict[str, object]:
        done.append(opset)
        path.write_bytes(f"export {len(done)}".encode())
        return {}

    monkeypatch.setattr(onnx_format, "export_onnx", export_onnx)
    return done


def _exported(made: Made, teacher: Network, sha256: str = "0f" * 32, opset: int = 20) -> Path:
    student = Artefact(path="student.onnx", sha256="", precision="fp32", versions={}, details={"opset": opset})
    return teacher_file("onnx", made.bundle, teacher, sha256, student, CPU)


def _torn(onnx: Path) -> None:
    onnx.write_bytes(b"torn")


def _torn_sidecar(onnx: Path) -> None:
    sidecar_of(onnx).write_text("{")


def _gone(onnx: Path) -> None:
    onnx.unlink()


def test_a_teacher_is_exported_once(made: Made, exports: list[int]) -> None:
    teacher = load_teacher(made.bundle, made.bundle.read(), None, None)
    paths = [_exported(made, teacher) for _ in range(2)]
    assert paths == [made.bundle.profile_path / "teacher.onnx"] * 2
    assert exports == [20]


@pytest.mark.parametrize("happens", [_torn, _torn_sidecar, _gone])
def test_and_again_where_the_file_is_not_whole(made: Made, exports: list[int], happens: Callable[[Path], None]) -> None:
    teacher = load_teacher(made.bundle, made.bundle.read(), None, None)
    happens(_exported(made, teacher))
    _exported(made, teacher)
    assert exports == [20, 20]


@pytest.mark.parametrize(("sha256", "opset"), [("1e" * 32, 20), ("0f" * 32, 19)])
def test_and_again_where_it_is_of_something_else(made: Made, exports: list[int], sha256: str, opset: int) -> None:
    teacher = load_teacher(made.bundle, made.bundle.read(), None, None)
    _exported(made, teacher)
    _exported(made, teacher, sha256, opset)
    assert exports == [20, opset]
