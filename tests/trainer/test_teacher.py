from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.finding import find_sections
from litdeploy.networks.sections import recording, run_section
from litdeploy.trainer.teacher import Teacher
from tests import sections
from tests.networks.test_sections import TOKENS, bert, llama, modern_bert

NAMES = ("layer1", "layer2", "layer3")
IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def module() -> torch.nn.Module:
    torch.manual_seed(0)
    network = resnet(20, width=8)
    with torch.no_grad():
        for _ in range(5):  # statistics that are not those of a new network
            network(torch.randn(32, 3, 16, 16))
    return network.eval()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_folded_teacher_gives_what_the_teacher_gives(module: torch.nn.Module, compiled: bool) -> None:
    teacher = Teacher(module, sections.of(module, NAMES), IMAGES, torch.device("cpu"), compiled=compiled)
    with torch.no_grad(), recording(module, sections.of(module, NAMES)) as calls:
        logits = module(IMAGES)
    found = teacher(IMAGES)
    torch.testing.assert_close(found.output, logits, rtol=1e-4, atol=1e-4)
    assert tuple(found.calls) == NAMES
    for name, call in calls.items():
        torch.testing.assert_close(found.calls[name].input, call.input, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.calls[name].output, call.output, rtol=1e-4, atol=1e-4)
        assert not found.calls[name].output.requires_grad


def test_in_bf16_all_but_the_logits_is_bf16(module: torch.nn.Module) -> None:
    found = Teacher(module, sections.of(module, NAMES), IMAGES, torch.device("cpu"), "bf16")(IMAGES)
    assert found.output.dtype == torch.float32
    assert {call.output.dtype for call in found.calls.values()} == {torch.bfloat16}


def test_the_module_is_left_as_it_is(module: torch.nn.Module) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.train()
    teacher = Teacher(module, sections.of(module, NAMES), IMAGES, torch.device("cpu"), "bf16")
    teacher(IMAGES)
    assert module.training
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(child._forward_hooks for child in module.modules())


def test_a_batch_is_not_overwritten_by_the_next(module: torch.nn.Module) -> None:
    teacher = Teacher(module, sections.of(module, NAMES), IMAGES, torch.device("cpu"))
    first = teacher(IMAGES)
    kept = first.calls["layer1"].output.clone()
    teacher(IMAGES.flip(0))
    assert torch.equal(first.calls["layer1"].output, kept)


@pytest.mark.parametrize("network", [bert, modern_bert, llama])
def test_the_blocks_further_arguments_are_recomputed_without_running_them(network: Callable[[], nn.Module]) -> None:
    module = network()
    found = find_sections(module, TOKENS)
    teacher = Teacher(module, found, TOKENS, torch.device("cpu"))
    assert teacher.recomputes(TOKENS)
    batch = {name: tensor.flip(0) for name, tensor in TOKENS.items()}
    call = teacher(batch).calls[found[0].name]
    with FlopCounterMode(display=False) as counted:
        arguments = teacher.arguments(batch)[found[0].name]
    again = run_section(found[0].blocks_in(teacher.module), call.input, arguments)
    assert torch.equal(again, call.output)
    assert counted.get_total_flops() < 20_000  # rotary angles
    assert not any("forward" in vars(block) for block in found[0].blocks_in(teacher.module))


class Carrying(nn.Module):
    """Each block gives the next one a tensor besides the hidden state, as a T5 does with its position bias."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            return self.linear(x) + (0 if bias is None else bias), x.mean(-1, keepdim=True)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


def test_arguments_that_come_from_other_blocks_are_not_recomputed(module: nn.Module) -> None:
    carrying, x = Carrying().eval(), torch.randn(2, 4)
    assert not Teacher(carrying, find_sections(carrying, x), x, torch.device("cpu")).recomputes(x)
    # A network without further tensors has nothing to recompute.
    assert not Teacher(module, sections.of(module, NAMES), IMAGES, torch.device("cpu")).recomputes(IMAGES)
