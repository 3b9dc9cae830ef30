from __future__ import annotations

import json
from pathlib import Path

from litdeploy.networks import new
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import write_checkpoint
from tests.cli.conftest import Run


def _judge(path: Path) -> Path:
    made = new("resnet8,width=4", normalise="half", input_shape=(3, 16, 16), classes=3, seed=1)
    write_checkpoint(path, made.module.state_dict(), made.spec)
    return path


def test_the_quality_of_made_images(
    run: Run, tmp_path: Path, generator_bundle: Bundle, generator_files: Path, teacher_path: Path
) -> None:
    judge = _judge(tmp_path / "judge.safetensors")
    words = ("--data", generator_files / "domains", "--quality", judge)
    told = run("evaluate", generator_bundle.student_path, *words, "--teacher", generator_files / "G.ckpt")
    assert told.code == 0, told.err
    student, teacher = told.out.splitlines()
    assert "test FID " in student
    assert "15 images" in student
    assert teacher.startswith("its teacher   test FID ")
    assert "covariance is singular" in told.err
    answer = run("evaluate", generator_bundle.path, "--quality", judge, "--json")
    found = json.loads(answer.out)
    assert found["split"] == "test"
    assert found["quality"]["judge"] == str(judge)
    for each in ("student", "teacher"):
        assert found["quality"][each]["fid"] > 0
        assert found["quality"][each]["inception_score"] >= 1
    assert f"FID {found['quality']['student']['fid']:.4f}" in student

    refused = run("evaluate", teacher_path, *words)
    assert (refused.code, refused.out) == (2, "")
    assert "makes none. Leave it out" in refused.err
    refused = run("evaluate", generator_bundle.path, "--quality", teacher_path)
    assert (refused.code, refused.out) == (2, "")
    assert "takes images of 1 × 8 × 8, but the generated ones have 3 × 16 × 16" in refused.err
    refused = run("evaluate", generator_bundle.path, "--quality", judge, "--min-accuracy", "5")
    assert refused.code == 2
    assert "Leave --retrieval and --min-accuracy out" in refused.err
