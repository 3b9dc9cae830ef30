from __future__ import annotations

from pathlib import Path

import pytest

from litdeploy.errors import CheckpointError
from litdeploy.files import sha256_of
from litdeploy.inspection import FoundNetwork, inspect
from litdeploy.networks import load, new
from litdeploy.networks.student import make_student
from litdeploy.storage.checkpoint import write_checkpoint


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


def test_a_student_of_some_sections_is_counted_whole(teacher_path: Path, tmp_path: Path) -> None:
    teacher, plan = load(teacher_path), {"layer2": (0,)}
    student = make_student(teacher.module, plan)
    write_checkpoint(tmp_path / "student.safetensors", student.state_dict(), teacher.spec.with_(plan=plan))
    found = inspect(tmp_path / "student.safetensors")
    assert isinstance(found, FoundNetwork)
    assert (found.title, found.breakdown.depth) == ("CIFAR ResNet-12", 12)
    assert [(part.name, part.blocks) for part in found.breakdown.parts[:3]] == [
        ("layer1", 2),
        ("layer2", 1),
        ("layer3", 2),
    ]


@pytest.mark.parametrize(
    ("network", "title"),
    [
        ("resnet8,width=4", "CIFAR ResNet-8"),
        ("resnext11,cardinality=1,width=4,out_width=4", "CIFAR ResNeXt-11"),
        ("vdcnn9,width=2,hidden=4", "VDCNN-9"),
        ("stargan,blocks=1,width=2", "StarGAN-8"),
    ],
)
def test_a_network_of_one_block_a_section_has_its_depth(network: str, title: str, tmp_path: Path) -> None:
    made = new(network, normalise="half" if network.startswith("r") else None, classes=10, seed=0)
    write_checkpoint(tmp_path / "a.safetensors", made.module.state_dict(), made.spec)
    found = inspect(tmp_path / "a.safetensors")
    assert isinstance(found, FoundNetwork)
    assert found.title.startswith(title)
    assert {part.blocks for part in found.breakdown.parts} == {1, None}
    assert found.student_depths == ()


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        inspect(tmp_path / "nothing.pt")


def test_modules_that_are_no_section_are_listed_with_the_reason(tmp_path: Path) -> None:
    named = "tests.networks.test_finding:Crossed"
    made = new(named, normalise="half", input_shape=(3, 8, 8), classes=3, seed=0)
    write_checkpoint(tmp_path / "a.safetensors", made.module.state_dict(), made.spec)
    found = inspect(tmp_path / "a.safetensors", network=named)
    assert isinstance(found, FoundNetwork)
    assert [part.name for part in found.breakdown.parts] == ["stem and head"]
    assert {each.name for each in found.candidates} == {"listed", "unused", "one+two"}


def test_a_text_encoder_states_its_task_and_pooling(bert_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(bert_folder)
    transformers.BertModel(config).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert isinstance(found, FoundNetwork)
    assert (found.task, found.classes, found.network) == ("embedding", 0, f"hf:{tmp_path},pooling=mean")
