"""Sections of networks in tests, by the names of their containers; the networks are not run."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from litdeploy.config.spec import DepthPlan
from litdeploy.networks import Section
from litdeploy.networks.sections import whole
from litdeploy.networks.student import own_sections


def of(module: nn.Module, names: Iterable[str]) -> list[Section]:
    """All blocks of each container."""
    return [whole(module, name) for name in names]


def of_student(student: nn.Module, teacher: nn.Module, plan: DepthPlan) -> list[Section]:
    """What a plan keeps of them."""
    return own_sections(student, of(teacher, plan), plan)
