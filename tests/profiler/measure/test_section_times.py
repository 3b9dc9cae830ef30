from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from litdeploy.config.spec import DepthPlan
from litdeploy.networks import Network, load
from litdeploy.networks.student import make_student
from litdeploy.profiler.measure.section_times import measure_sections
from tests import sections


class Slow(nn.Module):
    """A block that takes so long, and adds what its one weight says."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return images + self.weight


class Sleeping(nn.Module):
    """A stem of 4 ms, a section of 3 ms a block, and one of 1 ms a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Slow(0.004)
        self.long = nn.Sequential(*(Slow(0.003) for _ in range(3)))
        self.short = nn.ModuleList(Slow(0.001) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.long(self.stem(images))
        for block in self.short:
            hidden = block(hidden)
        return hidden.mean((2, 3))


def test_each_section_gets_its_own_time() -> None:
    teacher = load(Sleeping(), normalise="none", input_shape=(1, 4, 4))
    plan: DepthPlan = {"long": (0,), "short": (0, 1)}
    module = make_student(teacher.module, plan).eval()
    student = Network(module, teacher.spec, "student")
    pairs = sections.of(teacher.module, plan), sections.of_student(module, teacher.module, plan)
    found = measure_sections(teacher, student, pairs, [1, 2], torch.device("cpu"))
    assert [(each.name, each.batch_size) for each in found] == [
        (name, size) for size in (1, 2) for name in ("long", "short", "stem and head")
    ]
    # A sleep is never shorter; by how much it is longer, the machine decides.
    for each, least_teacher, least_student in zip(found, (9, 2, 4) * 2, (3, 2, 4) * 2, strict=True):
        assert each.teacher_ms >= least_teacher
        assert each.student_ms >= least_student
    assert found[0].teacher_ms == pytest.approx(3 * found[0].student_ms, rel=0.5)
    # Nothing is left hanging on the networks.
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in teacher.module.modules())


def test_a_section_of_which_the_student_has_no_block_takes_no_time() -> None:
    teacher = load(Sleeping(), normalise="none", input_shape=(1, 4, 4))
    plan: DepthPlan = {"long": (), "short": (0, 1)}
    module = make_student(teacher.module, plan).eval()
    pairs = sections.of(teacher.module, plan), sections.of_student(module, teacher.module, plan)
    long, short, rest = measure_sections(
        teacher, Network(module, teacher.spec, "student"), pairs, [1], torch.device("cpu")
    )
    assert (long.student_ms, long.teacher_ms >= 9) == (0, True)
    assert short.student_ms >= 2
    assert rest.student_ms >= 4
