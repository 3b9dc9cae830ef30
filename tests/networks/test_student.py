from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import nn

from litdeploy.errors import StudentError
from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.finding import find_sections
from litdeploy.networks.registry import FAMILIES
from litdeploy.networks.sections import Section
from litdeploy.networks.student import (
    block_influence,
    chosen,
    compose,
    divided,
    make_plan,
    make_student,
    merged,
    plan_for_depth,
    share_out,
    shorten,
    spaced,
)
from tests import sections
from tests.networks.test_sections import TOKENS, bert

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _sections(*blocks: int) -> list[Section]:
    return [
        Section(f"layer{index}", tuple(f"layer{index}.{block}" for block in range(count)), (1,), (1,))
        for index, count in enumerate(blocks, 1)
    ]


def test_blocks_are_evenly_spaced_with_the_first_and_the_last() -> None:
    assert spaced(3, 9) == (0, 4, 8)
    assert spaced(1, 9) == (0,)
    for blocks in range(1, 20):
        for kept in range(1, blocks + 1):
            chosen = spaced(kept, blocks)
            assert len(set(chosen)) == kept
            assert chosen[0] == 0
            assert kept == 1 or chosen[-1] == blocks - 1


def test_a_family_shares_out_evenly() -> None:
    plan = plan_for_depth(_sections(9, 9, 9), 20, FAMILIES["resnet"])
    assert plan == dict.fromkeys(("layer1", "layer2", "layer3"), (0, 4, 8))
    assert plan_for_depth(_sections(3, 3, 3), 20, FAMILIES["resnext"]) == dict.fromkeys(plan, (0, 2))


def test_two_plans_one_after_the_other_are_one() -> None:
    first = make_plan(_sections(9, 5), {"layer1": 5, "layer2": 3})
    left = make_plan(_sections(5, 3), {"layer1": 2})
    assert compose(first, left) == {"layer1": (0, 8), "layer2": (0, 2, 4)}
    module = resnet(32, width=4)
    one_by_one = make_student(make_student(module, {"layer1": (0, 2, 4)}), {"layer1": (0, 2)})
    at_once = make_student(module, compose({"layer1": (0, 2, 4)}, {"layer1": (0, 2)}))
    assert all(torch.equal(value, at_once.state_dict()[name]) for name, value in one_by_one.state_dict().items())


def test_elsewhere_depth_is_blocks_shared_out_in_proportion() -> None:
    assert {name: len(kept) for name, kept in plan_for_depth(_sections(3, 4, 6, 3), 8, None).items()} == {
        "layer1": 2,
        "layer2": 2,
        "layer3": 3,
        "layer4": 1,
    }


@pytest.mark.parametrize("blocks", [(3, 4, 6, 3), (1, 1, 30), (2, 2), (12,)])
def test_every_total_is_shared_out_within_the_teacher(blocks: tuple[int, ...]) -> None:
    sections = _sections(*blocks)
    for total in range(len(blocks), sum(blocks) + 1):
        shares = share_out(total, sections)
        assert sum(shares.values()) == total
        assert all(1 <= shares[section.name] <= section.blocks for section in sections)


@pytest.mark.parametrize(("depth", "message"), [(21, "has depth 21"), (62, "no deeper than its teacher"), (2, "2")])
def test_an_impossible_depth_names_the_possible_ones(depth: int, message: str) -> None:
    with pytest.raises(StudentError, match="Possible: 8, 14, 20, 26, 32, 38, 44, 50, 56") as caught:
        plan_for_depth(_sections(9, 9, 9), depth, FAMILIES["resnet"])
    assert message in str(caught.value)


def test_impossible_blocks_are_named() -> None:
    with pytest.raises(StudentError, match=r"layer1 \(9 blocks\)"):
        make_plan(_sections(9), {"layer7": 1})
    for count in (0, 10):
        with pytest.raises(StudentError, match="can keep 1 to 9"):
            make_plan(_sections(9), {"layer1": count})


def test_a_student_of_all_blocks_is_exactly_the_teacher() -> None:
    teacher = resnet(20).eval()
    plan = plan_for_depth(find_sections(teacher, EXAMPLE), 20, FAMILIES["resnet"])
    student = make_student(teacher, plan).eval()
    with torch.no_grad():
        assert torch.equal(student(EXAMPLE), teacher(EXAMPLE))
    shared = {value.data_ptr() for value in teacher.state_dict().values()}
    assert not any(value.data_ptr() in shared for value in student.state_dict().values())


def test_copied_blocks_stem_and_head_are_the_teachers() -> None:
    teacher = resnet(20)
    student = make_student(teacher, {"layer1": (0, 2)})
    weights = student.state_dict()
    assert len(student.layer1) == 2  # type: ignore[arg-type]
    assert len(student.layer2) == 3  # type: ignore[arg-type]
    assert torch.equal(weights["layer1.1.conv2.weight"], teacher.layer1[2].conv2.weight)
    assert torch.equal(weights["conv1.weight"], teacher.conv1.weight)
    assert torch.equal(weights["linear.weight"], teacher.linear.weight)
    assert len(teacher.layer1) == 3


def test_fresh_blocks_are_new_and_the_rest_is_the_teachers() -> None:
    teacher, fresh = resnet(20), resnet(20)
    student = make_student(teacher, {"layer1": (0, 2)}, fresh, sections.of(teacher, ["layer1"]))
    assert torch.equal(student.state_dict()["layer1.1.conv1.weight"], fresh.layer1[2].conv1.weight)
    assert torch.equal(student.state_dict()["layer2.0.conv1.weight"], teacher.layer2[0].conv1.weight)
    assert torch.equal(student.state_dict()["conv1.weight"], teacher.conv1.weight)


def test_a_module_list_is_shortened_too() -> None:
    teacher = bert()
    student = make_student(teacher, {"bert.encoder.layer": (0, 3)}).eval()
    assert len(student.bert.encoder.layer) == 2  # type: ignore[union-attr,arg-type]
    with torch.no_grad():
        assert student(**TOKENS).logits.shape == (2, 3)


@pytest.mark.parametrize("kept", [(-1, 0), (0, 3), (0, 0), (2, 0)])
def test_a_plan_that_does_not_fit_is_refused(kept: tuple[int, ...]) -> None:
    with pytest.raises(StudentError, match="which has 3"):
        shorten(resnet(20), {"layer1": kept})


def _stack(blocks: int, kinds: str = "", free: bool = True) -> Section:
    return Section("layer", tuple(f"layer.{n}" for n in range(blocks)), (4,), (4,), free=free, kinds=tuple(kinds))


def test_kinds_that_alternate_keep_their_share() -> None:
    section = _stack(22, "".join("G" if index % 3 == 0 else "L" for index in range(22)))
    assert chosen(section, 8) == (0, 1, 5, 10, 12, 16, 20, 21)
    for count in range(2, 23):
        kept = {section.kinds[index] for index in chosen(section, count)}
        assert len(chosen(section, count)) == count
        assert kept == {"G", "L"}


def test_the_blocks_of_most_influence_are_kept() -> None:
    influence = [0.1, 0.5, 0.2, 0.9, 0.3, 0.4]
    assert chosen(_stack(6), 3, influence) == (1, 3, 5)
    assert chosen(_stack(6, free=False), 3, influence) == (0, 1, 3)  # it downsamples
    assert chosen(_stack(6, "GLGLGL"), 3, influence) in {(1, 3, 4), (2, 3, 4)}
    assert chosen(_stack(6), 0, influence) == ()


def test_influence_is_how_much_a_block_changes_its_input() -> None:
    class Turn(nn.Module):
        """Turns vectors of two numbers by an angle: the cosine is known."""

        def __init__(self, degrees: float) -> None:
            super().__init__()
            angle = torch.tensor(math.radians(degrees))
            rows = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
            self.matrix = nn.Parameter(rows)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.matrix.T

    module = nn.Sequential(*(Turn(degrees) for degrees in (0, 60, 90, 180)))
    found = block_influence(module, find_sections(module, torch.randn(2, 5, 2)), [torch.randn(3, 5, 2)] * 2)
    assert found[""] == pytest.approx((0, 0.5, 1, 2), abs=1e-5)


def test_a_long_stack_is_divided_so_that_each_section_keeps_a_block() -> None:
    def names(blocks: int, kept: tuple[int, ...], wanted: int | Literal["auto"] = "auto") -> list[str]:
        return [section.name for section in divided([_stack(blocks)], {"layer": kept}, wanted)]

    assert names(12, (0, 4, 7, 11)) == ["layer[0:3]", "layer[3:6]", "layer[6:9]", "layer[9:12]"]
    assert names(12, (0, 6, 11)) == ["layer[0:4]", "layer[4:8]", "layer[8:12]"]
    assert names(6, (0, 2, 5), 3) == ["layer[0:2]", "layer[2:4]", "layer[4:6]"]
    assert names(12, (0, 1, 11), 3) == ["layer[0:1]", "layer[1:6]", "layer[6:12]"]
    assert names(4, (0, 3)) == names(12, (0,)) == ["layer"]
    (first, second) = divided([_stack(6)], {"layer": (0, 5)}, 2)
    assert (first.key, first.start, second.key, second.start, second.among) == ("layer", 0, "layer", 3, 6)
    assert merged({first: (0,), second: (2,)}, [first, second]) == {"layer": (0, 5)}


@pytest.mark.parametrize(
    ("sections", "kept", "wanted", "message"),
    [
        ([_stack(3)], (0, 1, 2), 2, r"has 3 blocks, .* two of them or more.* Give --sections 1"),
        ([_stack(12)], (0, 11), 3, r"the student keeps 2\..*Give --sections 2"),
        (_sections(3, 3), (0, 1), 2, r"has 2 sections already \(layer1, layer2\).*Leave it out"),
        ([Section("layer1", ("layer1.0", "layer1.1"), (4,), (8,))], (0,), 2, "is not uniform.*Leave it out"),
    ],
)
def test_a_stack_that_cannot_be_divided(
    sections: list[Section], kept: tuple[int, ...], wanted: int, message: str
) -> None:
    with pytest.raises(StudentError, match=message):
        divided(sections, {"layer": kept}, wanted)
