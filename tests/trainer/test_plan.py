from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from litdeploy.errors import CompilationError, TrainingError
from litdeploy.networks.families.resnet import resnet
from litdeploy.trainer import plan
from litdeploy.trainer.cache import Layout
from litdeploy.trainer.plan import compiles_step, compiles_teacher, fallback, forward_flops, plan_cache, section_flops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYOUT = Layout({"layer1.output": (16, 32, 32)}, {}, 10)
ONE_VIEW = 1000 * (2 * 16 * 32 * 32 + 40 + 6)


def test_forward_flops_counts_a_multiply_add_as_two() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.Flatten())
    assert forward_flops(module, torch.zeros(4, 3, 10, 10)) == 2 * 8 * 3 * 3 * 3 * 100


def test_forward_flops_leaves_the_module_as_it_is() -> None:
    module = resnet(8, width=4).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert forward_flops(module, torch.randn(2, 3, 8, 8)) > 0
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_section_flops_are_those_of_the_parts() -> None:
    module, example = resnet(14, width=4), torch.randn(2, 3, 8, 8)
    found = section_flops(module, ("layer1", "layer2", "layer3"), example)
    around = 2 * 4 * 3 * 3 * 3 * 64 + 2 * 16 * 10  # stem and head
    assert sum(found.values()) + around == forward_flops(module, example)
    assert found["layer1"] == 4 * 2 * 4 * 4 * 3 * 3 * 64
    assert list(found) == ["layer1", "layer2", "layer3"]


@pytest.mark.parametrize("decide", [compiles_teacher, compiles_step])
def test_compiling_is_by_choice_or_by_what_it_saves(decide: Any) -> None:
    assert decide("on", 0, CPU)
    assert decide("on", 0, CUDA)
    assert not decide("off", 1e18, CPU)
    assert decide("auto", 1e18, CPU)
    assert not decide("auto", 1e9, CPU)
    assert not decide("auto", 1e18, CUDA)


def test_a_failed_compilation_is_told_or_an_error() -> None:
    notes: list[str] = []
    fallback("auto", notes.append)("no compiler")
    assert notes == ["warning: not compiled, and slower for it: no compiler"]
    with pytest.raises(CompilationError, match=r"no compiler.*apt-get install g\+\+.*--compile off"):
        fallback("on", notes.append)("no compiler")


class Usage(NamedTuple):
    free: int


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How much there is of memory and disk, in views of the images; half of it may be used."""

    def give(memory: float, disk: float) -> None:
        monkeypatch.setattr(plan, "free_memory", lambda device: int(2 * memory * ONE_VIEW))
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: Usage(int(2 * disk * ONE_VIEW)))

    return give


@pytest.mark.parametrize(
    ("setting", "epochs", "device", "keep", "memory", "disk", "views", "mapped", "why"),
    [
        ("off", 100, CPU, False, 9, 9, 0, False, "off"),
        ("auto", 100, CPU, False, 4, 0, 4, False, r"4 views of 1,000 images, 0.13 GB in memory; .* 4 of 100 epochs"),
        ("auto", 7, CPU, False, 9, 9, 0, False, "less than twice in 7 epochs"),
        ("auto", 8, CPU, False, 9, 9, 4, False, "4 of 8 epochs"),
        ("auto", 7, CPU, True, 9, 9, 4, True, "features; the teacher runs in 4 of 7 epochs"),
        ("auto", 100, CPU, False, 3, 4, 4, True, "features"),
        ("auto", 100, CPU, False, 1.9, 9, 0, False, "do not fit"),
        ("auto", 100, CUDA, False, 3, 4, 0, False, "do not fit"),
        ("auto", 100, CPU, False, 3, 3, 0, False, "do not fit"),
        (6, 100, CUDA, False, 3, 6, 6, True, "6 views"),
        (1, 1, CPU, False, 1, 0, 1, False, "1 view of 1,000 images"),
    ],
)
def test_plan_cache(
    room: Any,
    tmp_path: Path,
    setting: Any,
    epochs: int,
    device: torch.device,
    keep: bool,
    memory: float,
    disk: float,
    views: int,
    mapped: bool,
    why: str,
) -> None:
    room(memory, disk)
    found = plan_cache(setting, LAYOUT, 1000, epochs, device, tmp_path / "features", keep)
    assert (found.views, found.mapped) == (views, mapped)
    assert re.search(why, found.why)


def test_several_ranks_keep_no_features(room: Any, tmp_path: Path) -> None:
    room(9, 9)
    found = plan_cache("auto", LAYOUT, 1000, 100, CPU, tmp_path, False, ranks=2)
    assert (found.views, found.why) == (0, "feature cache: none; it is not kept by several ranks, and there are 2")


def test_what_was_asked_for_and_does_not_fit_is_an_error(room: Any, tmp_path: Path) -> None:
    room(1, 1)
    with pytest.raises(TrainingError, match=r"--feature-cache 2: 2 views .* do not fit; .*--feature-cache off"):
        plan_cache(2, LAYOUT, 1000, 9, CPU, tmp_path, False)


def test_features_that_cannot_be_kept(tmp_path: Path) -> None:
    assert plan_cache("auto", None, 1000, 9, CPU, tmp_path, False).views == 0
    with pytest.raises(TrainingError, match="an attention mask"):
        plan_cache(2, None, 1000, 9, CPU, tmp_path, False)
