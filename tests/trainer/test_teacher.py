from __future__ import annotations

import pytest
import torch

from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.sections import recording
from litdeploy.trainer.teacher import Teacher
from tests import sections

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
