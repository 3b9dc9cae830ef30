from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import litdeploy
from tests.cli.conftest import Run

# None is how Python marks a module that cannot be imported; `find_spec`, which torch asks for scikit-learn, takes it
# for missing. matplotlib needs Pillow. Then one command line runs after the other.
WITHOUT = """
import json, sys
sys.modules.update(dict.fromkeys(("datasets", "PIL", "sklearn")))
from litdeploy.cli import main
for line in json.loads(sys.argv[1]):
    sys.argv = ["litdeploy", *line]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
"""
TARGET = """
device: cpu
runners: [eager, onnxruntime]
batch_sizes: [1]
timing: {warmup_ms: 1, samples: 8, max_seconds: 1}
"""


def test_help(run: Run) -> None:
    assert "pack" in run("data", "--help").out
    assert "--train-images" in run("data", "pack", "--help").out


def test_pack_shows_what_was_written(run: Run, tmp_path: Path) -> None:
    answer = run("data", "pack", "digits", "--out", "digits.safetensors", "--train-images", "100")
    assert answer.code == 0, answer.err
    assert "1 × 8 × 8" in answer.out
    assert "100  1,797" in answer.out
    assert "--data digits.safetensors" in answer.err

    answer = run("data", "pack", "digits", "--out", "digits.safetensors")
    assert answer.code == 2
    assert "is there already" in answer.err

    answer = run("data", "pack", "digits", "--out", "digits.safetensors", "--overwrite", "--json")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    assert told["bytes"] == (tmp_path / "digits.safetensors").stat().st_size
    assert told["header"]["images"] == {"train": 1797}


def test_the_commands_do_without_datasets_pillow_and_scikit_learn(run: Run, tmp_path: Path, teacher_path: Path) -> None:
    packing = run("data", "pack", "digits", "--out", "digits.safetensors", "--train-images", "300")
    assert packing.code == 0, packing.err
    (tmp_path / "quick.yaml").write_text(TARGET)
    data = ("--data", "digits.safetensors")
    short = (*data, "--epochs", "1")
    lines = [
        ("train", "resnet8,width=4", "--recipe", "digits-resnet-teacher", *short, "--out", "small.safetensors"),
        (
            "deploy",
            str(teacher_path),
            "--student-depth",
            "8",
            "--recipe",
            "digits-resnet",
            "--target",
            "quick.yaml",
            *short,
        ),
        ("evaluate", "deploy/export/student.onnx", *data, "--json"),
    ]
    here = {**os.environ, "PYTHONPATH": str(Path(litdeploy.__file__).parents[1])}
    command = [sys.executable, "-c", WITHOUT, json.dumps(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "There are no charts" in (tmp_path / "deploy" / "profile" / "report.html").read_text()
    answer = run("evaluate", "deploy", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["top1"] == json.loads(done.stdout[done.stdout.index("{") :])["top1"]
