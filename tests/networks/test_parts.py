from __future__ import annotations

import pytest
from torch import nn

from litdeploy.errors import NetworkError
from litdeploy.networks import FAMILIES, find_sections, load, new, sections_of
from litdeploy.networks.network import Network
from litdeploy.networks.student import make_student


def image_network(module: nn.Module) -> Network:
    return load(module, input_shape=(3, 8, 8), normalise="half")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.sections])
def test_the_names_of_a_family_are_those_that_are_found(name: str) -> None:
    network = {"vdcnn": "vdcnn17", "stargan": "stargan,width=2"}.get(name, f"{name}20")
    made = new(network, normalise=None if name == "vdcnn" else "half", classes=4, seed=0)
    found = find_sections(made.module, made.example())
    assert tuple(section.name for section in found) == FAMILIES[name].sections
    assert sections_of(made) == found


def test_what_a_plan_names_is_a_section_and_what_is_inside_it_is_none() -> None:
    def block() -> nn.Module:
        return nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(2)))

    module = nn.Sequential(nn.Sequential(block(), block(), block()), nn.Sequential(block(), block()), nn.Flatten())
    teacher = image_network(nn.Sequential(module, nn.Linear(192, 4)))
    assert [(each.name, each.blocks) for each in sections_of(teacher)] == [("0.0", 3), ("0.1", 2)]
    plan = {"0.0": (0,)}
    student = Network(make_student(teacher.module, plan).eval(), teacher.spec.with_(plan=plan), "student")
    assert [(each.name, each.blocks) for each in sections_of(student)] == [("0.0", 1), ("0.1", 2)]


def test_without_any_it_says_so() -> None:
    with pytest.raises(NetworkError, match="no repeated blocks"):
        sections_of(image_network(nn.Sequential(nn.Flatten(), nn.Linear(192, 4))))
