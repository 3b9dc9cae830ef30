"""Sections anywhere: parts of containers, modules in none, and the reasons why others are no section."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from litdeploy.batch import forward
from litdeploy.networks.finding import find_sections, survey
from litdeploy.networks.sections import PassThrough, recording, run_section
from litdeploy.networks.student import depths_of, make_student, own_sections, plan_for_depth

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class MBConv(nn.Module):
    """An inverted residual block, as of an EfficientNet; takes a rate of dropped connections, as theirs do."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.residual = channels == out and stride == 1
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, stride, 1, groups=2 * channels)
        self.project = nn.Conv2d(2 * channels, out, 1)

    def forward(self, x: Tensor, rate: float = 0.0) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x).relu()).relu())
        return x + y if self.residual else y


class Rows(nn.Module):
    """All blocks in one list, as an EfficientNet-Lite0 has them: stages of 1, 2, 3 and 1 blocks."""

    def __init__(self, channels: int = 3, classes: int = 3) -> None:
        super().__init__()
        rows = [(4, 4, 1), (4, 6, 2), (6, 6, 1), (6, 8, 1), (8, 8, 1), (8, 8, 1), (8, 10, 2)]
        self.stem, self.head = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(10, classes)
        self.rows = nn.ModuleList(MBConv(*row) for row in rows)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, row in enumerate(self.rows):
            x = row(x, index / 7)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class Siblings(nn.Module):
    """Blocks under attributes of their own, the first of which downsamples if it shall."""

    def __init__(self, first: int = 1, channels: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(4, classes)
        for number in range(1, 5):
            self.add_module(f"block{number}", MBConv(4, 4, first if number == 1 else 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number in range(1, 5):
            x = self.get_submodule(f"block{number}")(x, 0.1)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class Behind(nn.Module):
    """A stage whose first child downsamples and is of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 2, 2)), *(MBConv(4, 4, 1) for _ in range(3)))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.stage(x).mean((2, 3)))
        return y


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (Rows(), [("rows[1:3]", ("rows.1", "rows.2"), 1), ("rows[3:6]", ("rows.3", "rows.4", "rows.5"), 1)]),
        (Behind(), [("stage[1:4]", ("stage.1", "stage.2", "stage.3"), 0)]),
        (Siblings(), [("block1+block2+block3+block4", ("block1", "block2", "block3", "block4"), 0)]),
        (Siblings(2), [("block1+block2+block3+block4", ("block1", "block2", "block3", "block4"), 1)]),
    ],
)
def test_runs_of_alike_blocks_are_sections(module: nn.Module, found: list[tuple[str, tuple[str, ...], int]]) -> None:
    sections, _ = survey(module.eval(), IMAGES)
    assert [(each.name, each.paths, each.least) for each in sections] == found
    with torch.no_grad(), recording(module, sections) as calls:
        forward(module, IMAGES)
        for section in sections:
            call = calls[section.name]
            assert torch.equal(run_section(section.blocks_in(module), call.input, call.arguments), call.output)


@pytest.mark.parametrize("module", [Rows(), Behind(), Siblings()])
def test_a_student_of_any_depth_runs_its_sections_as_they_are_in_its_chain(module: nn.Module) -> None:
    sections = find_sections(module.eval(), IMAGES)
    for depth in depths_of(None, sections):
        plan = plan_for_depth(sections, depth, None)
        student = make_student(module, plan).eval()
        own = own_sections(student, sections, plan)
        assert sum(section.blocks for section in own) == depth
        with torch.no_grad(), recording(module, sections) as whole, recording(student, own) as calls:
            forward(module, IMAGES)
            forward(student, IMAGES)
            for section in own:
                if section.blocks:
                    copies = section.own(whole[section.name].arguments)
                    again = run_section(section.blocks_in(student), calls[section.name].input, copies)
                    assert torch.equal(again, calls[section.name].output)
    # The deepest student is the teacher; the copies are of the blocks that are named.
    with torch.no_grad():
        assert torch.equal(forward(student, IMAGES), forward(module, IMAGES))


def test_what_is_left_out_is_deleted_from_a_container_and_replaced_elsewhere() -> None:
    listed = make_student(Rows(), {"rows": (0, 1, 3, 6)})
    assert len(listed.rows) == 4  # type: ignore[arg-type]
    beside = make_student(Siblings(), {"block1+block2+block3+block4": (1,)})
    assert [type(beside.get_submodule(f"block{number}")) for number in range(1, 5)] == [
        PassThrough,
        MBConv,
        PassThrough,
        PassThrough,
    ]
    nothing = make_student(Behind(), {"stage": (0,)}).eval()
    with torch.no_grad():
        assert forward(nothing, IMAGES).shape == (2, 3)


class Crossed(nn.Module):
    """Blocks that look like a section and are none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)
        self.one, self.two = MBConv(4, 4, 1), MBConv(4, 4, 1)
        self.listed = nn.ModuleList(MBConv(4, 4, 1) for _ in range(2))
        self.unused = nn.ModuleList(MBConv(4, 4, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.two(self.one(x) * 2)
        for block in self.listed:
            x = x + block(x)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def test_every_candidate_has_its_reason_and_a_remedy() -> None:
    sections, candidates = survey(Crossed().eval(), IMAGES)
    assert not sections
    assert {each.name: each.reason for each in candidates} == {
        "listed": "its modules do not each run on the output of the one before",
        "unused": "its modules were not run",
        "one+two": "its modules do not each run on the output of the one before",
    }
    assert all(each.blocks == 2 and each.remedy for each in candidates)
