from __future__ import annotations

import torch
from torch import Tensor, nn

from litdeploy.config.spec import InputSpec, NetworkSpec
from litdeploy.networks import Network, build, find_sections, new
from litdeploy.networks.student import own_sections
from litdeploy.profiler.analysis.breakdown import break_down
from litdeploy.profiler.schema import REMAINDER
from tests import sections


class Convolutions(nn.Module):
    """A stem, and a section in an nn.ModuleList, which is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.stem(x_NCHW)
        for block in self.blocks:
            x_NCHW = block(x_NCHW)
        return x_NCHW.mean((2, 3))


def test_flops_and_parameters_of_convolutions_by_hand() -> None:
    spec = NetworkSpec(name="my.code:Convolutions", input=InputSpec(shape=(1, 5, 7), mean=(0.0,), std=(1.0,)))
    network = Network(Convolutions().eval(), spec, "here")
    found = break_down(network, sections.of(network.module, ["blocks"]))
    stem, block = 4 * 1 * 9, 4 * 4 * 9
    assert found.parameters == stem + 3 * block
    assert found.flops == 2 * 5 * 7 * (stem + 3 * block)  # two for a multiply-add, at every pixel
    assert (found.depth, found.depth_unit) == (3, "blocks")
    section, rest = found.parts
    assert (section.name, section.blocks, section.parameters, section.flops) == (
        "blocks",
        3,
        3 * block,
        2 * 35 * 3 * block,
    )
    assert (rest.name, rest.blocks, rest.parameters, rest.flops) == (REMAINDER, None, stem, 2 * 35 * stem)


def test_a_student_has_the_depth_of_its_family_and_the_teachers_sections() -> None:
    teacher = new("resnet,depth=14,in_channels=1", normalise="none", input_shape=(1, 8, 8), classes=10, seed=0)
    whole = find_sections(teacher.module, teacher.example())
    spec = teacher.spec.with_(plan={"layer1": (0,), "layer3": (0,)})
    student = Network(build(spec, None, "test").eval(), spec, "test")
    before = break_down(teacher, whole)
    after = break_down(student, own_sections(student.module, whole, spec.plan))
    assert (before.depth, after.depth, after.depth_unit) == (14, 10, "layers")
    assert [part.name for part in after.parts] == ["layer1", "layer2", "layer3", REMAINDER]
    assert [part.blocks for part in after.parts] == [1, 2, 1, None]
    assert sum(part.flops for part in after.parts) == after.flops < before.flops
    assert sum(part.parameters for part in after.parts) == after.parameters < before.parameters
    assert before.parts[-1] == after.parts[-1]


def test_counting_leaves_the_network_as_it_was() -> None:
    network = new("resnet,depth=8,in_channels=1", normalise="none", input_shape=(1, 8, 8), classes=10, seed=0)
    network.module.eval()
    state = {name: value.clone() for name, value in network.module.state_dict().items()}
    break_down(network, sections.of(network.module, ["layer1"]))
    assert all(torch.equal(value, state[name]) for name, value in network.module.state_dict().items())
