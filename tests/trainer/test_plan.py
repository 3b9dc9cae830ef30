from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from litdeploy.config.recipe import InDistillSettings, Recipe, read_recipe
from litdeploy.config.spec import DepthPlan
from litdeploy.config.target import Target, Timing
from litdeploy.errors import NetworkError, StudentError
from litdeploy.networks import Section, load, new, sections_of
from litdeploy.profiler import profile
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.trainer import compress
from litdeploy.trainer.objectives import Lit
from litdeploy.trainer.plan import plan_run
from litdeploy.trainer.resolve import resolve_recipe
from litdeploy.trainer.step import in_chain
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


QUICK: dict[str, Any] = {
    "data": {"source": "digits"},
    "main": {"epochs": 1, "learning_rate": 0.01},
    "finetune": {"epochs": 0, "learning_rate": 0.01},
    "device": "cpu",
    "precision": "fp32",
}


def trained(bundle: Bundle) -> list[str]:
    """Names of the sections whose losses were logged."""
    rows = [json.loads(line) for line in bundle.metrics_path.read_text().splitlines()]
    return list(
        dict.fromkeys(key.removeprefix("section/") for row in rows for key in row if key.startswith("section/"))
    )


@pytest.mark.parametrize(
    ("network", "sections", "plan"),
    [
        ("Rows", ["rows[1:3]", "rows[3:6]"], {"rows": (0, 1, 3, 5, 6)}),
        ("Siblings", ["block1+block2+block3+block4"], {"block1+block2+block3+block4": (0, 2, 3)}),
    ],
)
def test_sections_that_are_no_container_train_and_load_again(
    network: str, sections: list[str], plan: DepthPlan, tmp_path: Path
) -> None:
    named = f"tests.networks.test_finding:{network},channels=1,classes=10"
    teacher = new(named, normalise="half", input_shape=(1, 8, 8), classes=10, seed=0)
    write_checkpoint(tmp_path / "teacher.safetensors", teacher.module.state_dict(), teacher.spec)
    bundle = compress(
        tmp_path / "teacher.safetensors", out=tmp_path / "deploy", network=named, student_depth=3, beta=0.0, **QUICK
    )
    assert trained(bundle) == sections
    assert bundle.read().student.plan == plan
    student = load(bundle.student_path, network=named)
    assert [section.blocks for section in sections_of(student)] != []
    assert torch.isfinite(student.module(student.example())).all()


@pytest.mark.parametrize("blocks", ["spaced", "influence"])
def test_a_long_stack_learns_in_several_sections(
    blocks: str, bert_folder: Path, reviews_path: Path, tmp_path: Path
) -> None:
    made = new(f"hf:{bert_folder},num_hidden_layers=6", normalise=None, classes=2, seed=0).within(12)
    spec = made.spec.with_(classes=("better", "worse"))
    write_checkpoint(tmp_path / "teacher.safetensors", made.module.state_dict(), spec)
    bundle = compress(
        tmp_path / "teacher.safetensors",
        out=tmp_path / "deploy",
        student_depth=3,
        blocks=blocks,
        **{**QUICK, "data": {"source": str(reviews_path)}, "finetune": {"epochs": 1, "learning_rate": 1e-3}},
    )
    names = trained(bundle)
    assert len(names) == 2
    assert names[0].startswith("bert.encoder.layer[0:")
    assert names[1].endswith(":6]")
    (kept,) = (bundle.read().student.plan or {}).values()
    assert len(kept) == 3
    assert kept == (0, 2, 5) or blocks == "influence"
    quick = Target(device="cpu", runners=("eager",), batch_sizes=(1,), timing=Timing(samples=8, max_seconds=1))
    report = profile(bundle, target=quick)
    assert [each.name for each in report.section_times] == [*names, "stem and head"]
    assert sum(part.blocks or 0 for part in report.student.breakdown.parts) == 3


def test_a_first_section_without_blocks_is_not_taken_from_the_chain() -> None:
    """The chain's next section then runs on another input than the teacher's."""
    first, second = Section("a[1:2]", (), (4,), (4,)), Section("a[2:4]", ("a.1",), (4,), (4,))
    objective = Lit(Recipe(), ["a[2:4]"])
    assert in_chain(objective, [first, second]) == ()
    assert in_chain(objective, [second]) == ("a[2:4]",)


class Numbered(nn.Module):
    """Its forward names the last block by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for number in range(4):
            x = self.blocks[number](x)
        return x


@pytest.mark.parametrize(
    ("module", "blocks", "message"),
    [
        (Numbered(), {"blocks": 3}, r"does not run with these blocks of its teacher alone: blocks 0, 2, 3 \(.*range"),
        (
            nn.Sequential(nn.Flatten(), nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))),
            {"1": 0},
            "no block of 1,",
        ),
    ],
)
def test_a_student_that_cannot_be(module: nn.Module, blocks: dict[str, int], message: str) -> None:
    teacher = load(module, normalise="half", input_shape=(1, 8, 8))
    with pytest.raises(StudentError, match=message):
        plan_run(teacher, Recipe(student_blocks=blocks), None, torch.device("cpu"))
