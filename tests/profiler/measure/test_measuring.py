from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from litdeploy.config.target import Target, Timing
from litdeploy.errors import RunnerError
from litdeploy.networks import Network, load
from litdeploy.profiler.measure.measuring import Pair, Program, measure_runners

TARGET = Target(
    device="cpu", runners=("eager",), batch_sizes=(1, 2, 4), timing=Timing(warmup_ms=1, samples=32, max_seconds=2)
)
CPU = torch.device("cpu")


class Head(nn.Module):
    """Sleeps for so long, and does not take some batch sizes."""

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
    """Asleep, neither side loses the core to other work: by how much it is slower is in the module."""
    results = measure_runners(lambda runner: pair(network(0.002), network(0.006)), TARGET, CPU, lambda line: None)
    assert [each.comparison.verdict for each in results.measurements] == ["slower"] * 3
    assert all(each.comparison.speedup < 0.7 for each in results.measurements)
    assert all(each.student.peak_memory_bytes is not None for each in results.measurements)


def test_a_batch_size_that_fails_is_left_out() -> None:
    lines: list[str] = []
    results = measure_runners(lambda runner: pair(network(0, (2,)), network(0)), TARGET, CPU, lines.append)
    assert [each.batch_size for each in results.measurements] == [1, 4]
    [failure] = results.failures
    assert (failure.runner, failure.batch_size) == ("eager", 2)
    assert failure.message == "RuntimeError: no room for 2"
    assert any("eager, batch 2: left out" in line for line in lines)
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
