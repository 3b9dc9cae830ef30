from __future__ import annotations

from pathlib import Path

import pytest

from litdeploy.errors import SettingsError
from litdeploy.evaluation import evaluate_quality
from litdeploy.networks import new
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained classifier of the generator's images."""
    made = new("resnet8,width=2", normalise="half", input_shape=(3, 16, 16), classes=3, seed=1)
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    write_checkpoint(path, made.module.state_dict(), made.spec.with_(classes=("blue", "green", "red")))
    return str(path)


def test_a_bundles_student_and_its_teacher_are_judged(
    generator_bundle: Bundle, generator_files: Path, judge_path: str
) -> None:
    found = evaluate_quality(generator_bundle.path, features=judge_path, batch_size=4)
    assert (found.judge, found.features, found.images, found.notes) == (judge_path, 8, 15, ())
    assert found.teacher is not None
    assert found.student.fid > 0
    assert 1 <= found.student.inception_score <= 3
    assert found.student != found.teacher
    # The teacher alone, by its file and in other batches, comes to the same.
    data = str(generator_files / "domains")
    alone = evaluate_quality(
        generator_files / "G.ckpt", features=judge_path, data=data, input_shape=(3, 16, 16), batch_size=256
    )
    assert alone.teacher is None
    assert alone.student.fid == pytest.approx(found.teacher.fid, rel=1e-3)
    assert alone.student.inception_score == pytest.approx(found.teacher.inception_score, rel=1e-4)
    other = evaluate_quality(generator_bundle.student_path, features=judge_path, data=data, split="train")
    assert other.images == 33  # three are held out for validation


def test_too_few_images_are_told(generator_bundle: Bundle, tmp_path: Path) -> None:
    wide = new("resnet8,width=4", normalise="half", input_shape=(3, 16, 16), classes=3, seed=1)
    write_checkpoint(tmp_path / "wide.pt.safetensors", wide.module.state_dict(), wide.spec)
    found = evaluate_quality(generator_bundle.path, features=str(tmp_path / "wide.pt.safetensors"))
    assert found.features == 16
    assert "15 images by 16 features: their covariance is singular" in found.notes[0]


def test_a_classifier_has_no_quality(teacher_path: Path, judge_path: str) -> None:
    with pytest.raises(SettingsError, match=r"makes none\. Leave it out"):
        evaluate_quality(teacher_path, features=judge_path, data="digits")


def test_a_generator_is_no_judge(generator_bundle: Bundle) -> None:
    with pytest.raises(SettingsError, match="no classifier of images"):
        evaluate_quality(generator_bundle.path, features=str(generator_bundle.student_path))
