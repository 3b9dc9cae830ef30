from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from litdeploy.config.recipe import DataSettings
from litdeploy.errors import DataError
from litdeploy.networks import Network, load, sections_of
from litdeploy.networks.student import own_sections
from litdeploy.profiler.analysis.fidelity import compare_sections, measure_fidelity
from litdeploy.profiler.schema import Deviation, Fidelity
from litdeploy.tasks import TASKS
from tests import sections
from tests.profiler.conftest import Made

TASK = TASKS["classification"]
SECTIONS = ["first", "second"]


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class TupleScale(Scale):
    """A block that returns more than its hidden state."""

    def forward(self, x: Tensor | tuple[Tensor, str]) -> tuple[Tensor, str]:  # type: ignore[override]
        return super().forward(x), "more"


class Scales(nn.Module):
    """A linear network whose parts each multiply by what is said: every error is known."""

    def __init__(self, stem: float, first: list[float], second: list[float], head: float = 1.0) -> None:
        super().__init__()
        self.stem, self.head = Scale(stem), Scale(head)
        self.first = nn.Sequential(*map(Scale, first))
        self.second = nn.ModuleList(map(TupleScale, second))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        hidden = self.first(self.stem(x_NCHW))
        for block in self.second:
            hidden, _ = block(hidden)
        return self.head(hidden).flatten(1)


def batches() -> list[Tensor]:
    return [torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(count)) for count in (5, 2)]


def percent(deviations: tuple[Deviation, ...]) -> dict[str, tuple[int, int]]:
    return {each.name: (round(100 * (each.on_teacher or 0)), round(100 * (each.on_own or 0))) for each in deviations}


def compared(teacher: Scales, student: Scales) -> Fidelity:
    pairs = sections.of(teacher, SECTIONS), sections.of_student(student, teacher, dict.fromkeys(SECTIONS, (0,)))
    return compare_sections(teacher, student, pairs, batches(), TASK)


def test_an_error_is_shown_where_it_enters_and_compounds_after() -> None:
    teacher = Scales(1, [1, 1], [1, 1])
    found = compared(teacher, Scales(1.1, [1.2], [1.0]))
    assert found.images == 7
    assert percent(found.deviations) == {"stem": (10, 10), "first": (20, 32), "second": (0, 32), "logits": (0, 32)}
    assert found.same_class_on_own == found.same_class_on_teacher == 1

    found = compared(teacher, Scales(1, [1], [0.75], head=-1))
    assert percent(found.deviations) == {"stem": (0, 0), "first": (0, 0), "second": (25, 25), "logits": (200, 175)}
    assert found.same_class_on_own == found.same_class_on_teacher == 0


def test_a_section_of_which_the_student_has_no_block_is_left_out() -> None:
    """The head still gets the output of the teacher's last section, and the stem is compared at its own output."""
    teacher = Scales(1, [2], [3])
    for student, plan, expected in (
        (Scales(1, [2], []), {"first": (0,), "second": ()}, {"stem": (0, 0), "first": (0, 0), "logits": (0, 67)}),
        (Scales(1, [], [3]), {"first": (), "second": (0,)}, {"stem": (0, 0), "second": (0, 50), "logits": (0, 50)}),
    ):
        pairs = sections.of(teacher, SECTIONS), sections.of_student(student, teacher, plan)
        assert percent(compare_sections(teacher, student, pairs, batches(), TASK).deviations) == expected


def test_the_teacher_itself_has_no_error_and_is_left_as_it_was() -> None:
    teacher = Scales(2, [3, 1], [1, 0.5])
    found = compared(teacher, Scales(2, [3], [0.5]))
    assert all(each.on_teacher == each.on_own == 0 for each in found.deviations)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


def test_what_is_not_finite_or_has_no_scale_is_none() -> None:
    found = compared(Scales(1, [1, 1], [0, 1]), Scales(1, [math.nan], [1.0]))
    by_name = {each.name: each for each in found.deviations}
    assert by_name["first"].on_teacher is None
    assert by_name["second"].on_own is None  # zeros are its reference


def test_on_the_test_images_of_a_bundle(made: Made) -> None:
    manifest = made.bundle.read()
    teacher, student = load(made.teacher), load(made.bundle.student_path)
    whole, plan = sections_of(teacher), student.spec.plan
    pairs = whole, own_sections(student.module, whole, plan)
    found = measure_fidelity(manifest, teacher, student, pairs, torch.device("cpu"))
    assert found.images == 256
    assert [each.name for each in found.deviations] == ["stem", "layer1", "layer2", "layer3", "logits"]
    assert found == measure_fidelity(manifest, teacher, student, pairs, torch.device("cpu"))

    itself = Network(teacher.module, student.spec, "")
    same = measure_fidelity(manifest, teacher, itself, (whole, whole), torch.device("cpu"))
    assert all(each.on_teacher == each.on_own == 0 for each in same.deviations)
    assert same.same_class_on_own == 1


def test_data_that_are_gone(made: Made, tmp_path: Path) -> None:
    manifest = made.bundle.read()
    gone = manifest.recipe.model_copy(update={"data": DataSettings(source=str(tmp_path / "gone"))})
    networks = load(made.teacher), load(made.bundle.student_path)
    with pytest.raises(DataError, match="gone"):
        measure_fidelity(manifest.model_copy(update={"recipe": gone}), *networks, ([], []), torch.device("cpu"))
