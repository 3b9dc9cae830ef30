from __future__ import annotations

from pathlib import Path

import pytest
import torch

from litdeploy.config.recipe import InDistillSettings, Recipe, read_recipe
from litdeploy.errors import NetworkError, StudentError
from litdeploy.networks import new
from litdeploy.trainer.plan import plan_run
from litdeploy.trainer.resolve import resolve_recipe
from litdeploy.trainer.teacher import read_teacher

_CODE = """
from pathlib import Path
from litdeploy.networks.families.resnet import resnet

def build():
    Path("was-run").touch()
    return resnet(8)
"""


@pytest.mark.parametrize("name", ["recipe_code:build", "recipe_code:build,depth=8"])
def test_a_recipe_names_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe_code.py").write_text(_CODE)
    (tmp_path / "a.yaml").write_text(f"network: {name}\n")
    with pytest.raises(NetworkError, match=f"run only when you name it: --network {name}"):
        read_teacher(teacher_path, read_recipe("a.yaml"), None)
    assert not (tmp_path / "was-run").exists()


def test_a_recipe_names_no_code_for_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe_code.py").write_text(_CODE)
    student = "recipe_code:build"
    (tmp_path / "a.yaml").write_text(f"method: indistill\nindistill: {{student: {student}}}\n")
    for recipe in ("a.yaml", read_recipe("a.yaml")):
        with pytest.raises(NetworkError, match=f"run only when you name it: --student-network {student}"):
            resolve_recipe(recipe, {"data": "digits"})
        named = resolve_recipe(recipe, {"data": "digits", "indistill": {"student": student}})
        assert named.indistill == InDistillSettings(student=student)
    assert not (tmp_path / "was-run").exists()


def test_a_student_of_its_own_is_for_images() -> None:
    teacher = new("vdcnn9", normalise=None, classes=3, seed=0)
    recipe = Recipe(method="indistill", indistill=InDistillSettings(student="vdcnn9"))
    with pytest.raises(StudentError, match=r"takes characters. Choose another method"):
        plan_run(teacher, recipe, None, torch.device("cpu"))


def test_a_recipe_names_one_of_our_networks(tmp_path: Path, teacher_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("network: resnet14\n")
    network, record = read_teacher(teacher_path, read_recipe(tmp_path / "a.yaml"), None)
    assert network.spec.name == "resnet"
    assert record is not None
