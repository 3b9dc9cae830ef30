from __future__ import annotations

import pytest
import torch

from litdeploy.errors import StudentError
from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.registry import FAMILIES
from litdeploy.networks.sections import Section, find_sections
from litdeploy.networks.student import compose, make_plan, make_student, plan_for_depth, share_out, shorten, spaced
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


@pytest.mark.parametrize("kept", [(), (1, 2), (0, 3), (0, 0), (2, 0)])
def test_a_plan_that_does_not_fit_is_refused(kept: tuple[int, ...]) -> None:
    with pytest.raises(StudentError, match="which has 3"):
        shorten(resnet(20), {"layer1": kept})
