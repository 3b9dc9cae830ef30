from __future__ import annotations

from pathlib import Path

import pytest

from litdeploy.bundle import sha256_of
from litdeploy.checkpoint import write_checkpoint
from litdeploy.errors import CheckpointError
from litdeploy.inspection import FoundNetwork, inspect
from litdeploy.networks import load
from litdeploy.networks.student import make_student


def test_weights(teacher_path: Path) -> None:
    found = inspect(teacher_path)
    assert isinstance(found, FoundNetwork)
    assert found.title == "CIFAR ResNet-14"
    assert (found.classes, found.class_names) == (10, tuple("0123456789"))
    assert found.student_depths == (8, 14)
    assert found.plan is None
    assert found.breakdown.depth == 14
    assert found.sha256 == sha256_of(teacher_path)


def test_a_student_names_the_blocks_that_it_kept(teacher_path: Path, tmp_path: Path) -> None:
    teacher = load(teacher_path)
    plan = {"layer1": (0,), "layer2": (0, 1), "layer3": (0,)}
    student = make_student(teacher.module, plan)
    write_checkpoint(tmp_path / "student.safetensors", student.state_dict(), teacher.spec.with_(plan=plan))
    found = inspect(tmp_path / "student.safetensors")
    assert isinstance(found, FoundNetwork)
    assert found.plan == plan
    assert found.student_depths == ()
    assert found.breakdown.depth == 10


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        inspect(tmp_path / "nothing.pt")
