from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_trainings_are_listed_for_a_queue(run: Run, teacher_path: Path) -> None:
    answer = run("compare", "digits-resnet", "--teacher", teacher_path, "--depths", "8,14", "--seeds", 1, "--list")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert len(lines) == 8
    assert all(line.startswith(f"litdeploy compress {teacher_path} --recipe comparison/recipe.yaml") for line in lines)


def test_a_comparison_is_printed_and_read_by_programs(run: Run, teacher_path: Path) -> None:
    asked = ("compare", "digits-resnet", "--teacher", teacher_path, "--depths", 8, "--seeds", 1, "--methods", "kd,lit")
    told = run(*asked, "--epochs", 1, "--device", "cpu")
    assert told.code == 0
    assert "ResNet-14" in told.out
    answer = run(*asked, "--epochs", 1, "--device", "cpu", "--json")
    assert {row["method"] for row in json.loads(answer.out)["rows"]} == {"kd", "lit"}


def test_bad_input_gets_a_message(run: Run, teacher_path: Path) -> None:
    asked = ("compare", "digits-resnet", "--teacher", teacher_path)
    for options, message in (
        (("--depths", "8,deep"), "--depths 8,deep: whole numbers of at least 1 are needed, as in 14,20,32."),
        (("--depths", "9"), "9"),
        (("--depths", "8", "--methods", "magic"), "magic"),
    ):
        answer = run(*asked, *options)
        assert answer.code == 2
        assert message in answer.err
        assert "Traceback" not in answer.err


def test_list_notes_on_standard_error_that_a_chain_is_left_out(run: Run, teacher_path: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("data: {source: digits}\nstudent_depth: [11, 8]\n")
    answer = run("compare", "my.yaml", "--teacher", teacher_path, "--depths", "8", "--seeds", 1, "--list")
    assert answer.code == 0, answer.err
    assert "chain 11,8 is ignored" in answer.err
    assert all(line.startswith("litdeploy compress ") for line in answer.out.splitlines())
