from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import pytest
import torch
from torch import Tensor

from litdeploy.profiler.timing import measure
from litdeploy.runtime import Description
from litdeploy.target import Timing


class Sleeper:
    """A runner that computes nothing for so long, and notes each call in a list that it may share."""

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


def test_a_call_takes_at_least_as_long_as_it_sleeps() -> None:
    timed = measure(*pair([], 0.005, 0.001), BATCH, Timing(warmup_ms=0, samples=8, max_seconds=2))
    assert timed.clock == "wall"
    assert min(timed.teacher.milliseconds) >= 5
    assert timed.teacher.first_run_ms >= 5
    assert min(timed.student.milliseconds) >= 1


def test_the_sides_alternate_in_blocks_of_both_orders() -> None:
    calls: list[str] = []
    timed = measure(*pair(calls, 0, 0), BATCH, Timing(warmup_ms=0, samples=64, max_seconds=5))
    blocks = [timed.order[index : index + 4] for index in range(0, len(timed.order), 4)]
    assert set(blocks) == {"TSST", "STTS"}
    assert len(timed.teacher.milliseconds) == len(timed.student.milliseconds) == 64
    assert "".join(calls).endswith(timed.order)  # what is said is what was done


def test_the_order_is_the_same_for_the_same_seed() -> None:
    timing = Timing(warmup_ms=0, samples=64, max_seconds=5)
    orders = [measure(*pair([], 0, 0), BATCH, timing, seed=seed).order for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_samples_keep_the_order_in_which_they_were_taken() -> None:
    teacher, student = pair([], 0, 0)
    slower = iter(range(1000))

    def run(batch_NCHW: Tensor) -> Tensor:
        time.sleep(0.0005 * next(slower))
        return batch_NCHW

    teacher.run = run  # type: ignore[method-assign]
    times = measure(teacher, student, BATCH, Timing(warmup_ms=0, samples=8, max_seconds=0.5)).teacher.milliseconds
    assert times[-1] > times[0]


def test_one_block_is_timed_whatever_the_limit() -> None:
    timed = measure(*pair([], 0.002, 0.002), BATCH, Timing(warmup_ms=0, samples=1000, max_seconds=0.001))
    assert len(timed.order) == 4
    assert len(timed.teacher.milliseconds) == 2


def test_warms_up_for_as_long_as_it_is_told() -> None:
    calls: list[str] = []
    measure(*pair(calls, 0.001, 0.001), BATCH, Timing(warmup_ms=50, samples=8, max_seconds=0.1))
    warm = "".join(calls)[2:-16]
    assert warm == "T" * warm.count("T") + "S" * warm.count("S")
    assert min(warm.count("T"), warm.count("S")) > 2


@pytest.mark.gpu
def test_device_time_leaves_the_host_out() -> None:
    calls: list[str] = []
    batch = torch.randn(8, 3, 256, 256, device="cuda")
    teacher, student = Sleeper("T", 0, calls, "cuda"), Sleeper("S", 0, calls, "cuda")
    timed = measure(teacher, student, batch, Timing(warmup_ms=20, samples=40, max_seconds=5))
    assert timed.clock == "device"
    assert len(timed.teacher.milliseconds) == len(timed.student.milliseconds) == 40
    assert min(timed.teacher.milliseconds) > 0
