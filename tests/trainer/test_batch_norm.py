from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litdeploy.errors import SettingsError
from litdeploy.networks.families.resnet import resnet
from litdeploy.trainer.batch_norm import SynchronizedBatchNorm, estimate_statistics, synchronized
from litdeploy.trainer.distributed import ALONE
from tests import sections

# Several ranks are in test_parallel.py.

NAMES = ("layer1", "layer2", "layer3")
BATCHES = torch.randn(3, 8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "shape", "settings"),
    [
        (nn.BatchNorm1d, (6, 3), {}),
        (nn.BatchNorm1d, (6, 3, 4), {"momentum": None}),
        (nn.BatchNorm2d, (6, 3, 4, 5), {"momentum": 0.3, "eps": 1e-3}),
        (nn.BatchNorm2d, (6, 3, 4, 5), {"affine": False}),
        (nn.BatchNorm2d, (6, 3, 4, 5), {"track_running_stats": False}),
    ],
)
def test_one_ranks_synchronised_norm_is_an_ordinary_one(
    kind: type[nn.BatchNorm2d], shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    ordinary = kind(3, **settings)
    norm = SynchronizedBatchNorm(copy.deepcopy(ordinary), ALONE)
    assert list(norm.state_dict()) == list(ordinary.state_dict())
    for _ in range(3):
        x = 2 + torch.randn(shape)
        torch.testing.assert_close(norm(x), ordinary(x))
    torch.testing.assert_close(norm.state_dict(), ordinary.state_dict())
    torch.testing.assert_close(norm.eval()(x), ordinary.eval()(x))
    assert norm.train()(x.bfloat16()).dtype == torch.bfloat16


def test_a_student_is_the_same_before_and_after() -> None:
    student = resnet(8, width=4).train()
    student.layer1.eval()
    before, modules, keys = copy.deepcopy(student), list(student.modules()), list(student.state_dict())
    with synchronized(student, ALONE):
        assert sum(isinstance(module, SynchronizedBatchNorm) for module in student.modules()) == 7
        assert not any(isinstance(module, nn.BatchNorm2d) for module in student.modules())
        assert list(student.state_dict()) == keys
        assert [module.training for module in student.modules()] == [module.training for module in before.modules()]
        torch.testing.assert_close(student(BATCHES[0]), before(BATCHES[0]))
    assert all(after is module for after, module in zip(student.modules(), modules, strict=True))
    torch.testing.assert_close(student.state_dict(), before.state_dict())  # the running statistics were followed


class Activated(nn.BatchNorm2d):
    """As timm's `BatchNormAct2d`: the activation is inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.act(super().forward(x)))


def test_what_a_norm_runs_after_normalising_is_kept() -> None:
    ordinary = nn.Sequential(Activated(3)).train()
    before = copy.deepcopy(ordinary)
    with synchronized(ordinary, ALONE):
        assert isinstance(ordinary[0], SynchronizedBatchNorm)
        assert list(ordinary.state_dict()) == list(before.state_dict())
        torch.testing.assert_close(ordinary(BATCHES[0]), before(BATCHES[0]))
        torch.testing.assert_close(ordinary.eval()(BATCHES[0]), before.eval()(BATCHES[0]))


class Leaky(nn.BatchNorm2d):
    """As InPlaceABN: the activation is no module."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(super().forward(x))


def test_a_norm_that_cannot_be_imitated_is_refused() -> None:
    student = nn.Sequential(nn.BatchNorm2d(3), Leaky(3))
    with pytest.raises(SettingsError, match="Leaky is no batch norm of torch's"), synchronized(student, ALONE):
        pass
    assert type(student[0]) is nn.BatchNorm2d


def test_statistics_are_estimated_in_the_students_own_chain() -> None:
    student = resnet(8, width=4).eval()
    stem = {name: value.clone() for name, value in student.bn1.state_dict().items()}
    given: list[torch.Tensor] = []
    first = student.layer1[0].bn1
    handle = first.register_forward_pre_hook(lambda norm, args: given.append(args[0]))
    estimate_statistics(student, sections.of(student, NAMES), BATCHES)
    handle.remove()
    torch.testing.assert_close(first.running_mean, torch.stack([x.mean((0, 2, 3)) for x in given]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([x.var((0, 2, 3)) for x in given]).mean(0))
    assert first.momentum == 0.1
    assert all(torch.equal(value, stem[name]) for name, value in student.bn1.state_dict().items())
    estimated = copy.deepcopy(student.state_dict())
    estimate_statistics(student, sections.of(student, NAMES), BATCHES)
    assert all(torch.equal(value, estimated[name]) for name, value in student.state_dict().items())
