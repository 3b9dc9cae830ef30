"""The commands, one after the other, as a user types them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from litdeploy.storage.bundle import Bundle
from litdeploy.trainer import compress
from tests.cli.conftest import Run

COMPRESS = ("--recipe", "digits-resnet", "--student-depth", "8", "--epochs", "1")
TARGET = """
device: cpu
runners: [eager, onnxruntime]
batch_sizes: [1, 4]
timing: {warmup_ms: 1, samples: 8, max_seconds: 1}
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "quick.yaml"
    path.write_text(TARGET)
    return path


@pytest.fixture(scope="module")
def once(teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `COMPRESS` makes of the teacher. Nothing is written into it."""
    out = tmp_path_factory.mktemp("once") / "deploy"
    return compress(teacher_path, recipe="digits-resnet", student_depth=8, epochs=1, out=out).path


@pytest.fixture
def compressed(once: Path, tmp_path: Path) -> Bundle:
    """A copy in the default folder."""
    return Bundle(shutil.copytree(once, tmp_path / "deploy"))


def test_compress_export_profile_with_the_default_folder(
    run: Run, teacher_path: Path, tmp_path: Path, target: Path
) -> None:
    answer = run("compress", teacher_path, *COMPRESS)
    assert answer.code == 0, answer.err
    assert "teacher" in answer.out
    assert "used once" in answer.err
    answer = run("export", "--onnx", "--target", target)
    assert answer.code == 0, answer.err
    assert "largest difference" in answer.out
    answer = run("profile", "--target", target, "--csv", "out/x.csv", "--trace", "out/t.json.gz", "--min-speedup", "99")
    assert answer.code == 3
    assert "--min-speedup 99" in answer.err
    assert "onnxruntime" in answer.out
    assert (tmp_path / "out" / "x.csv").read_text().startswith("bundle,")
    assert (tmp_path / "out" / "t.json.gz").is_file()
    assert (tmp_path / "deploy" / "profile" / "report.html").is_file()

    accuracies = {}
    for path in ("deploy", "deploy/student.safetensors", "deploy/export/student.onnx"):
        answer = run("evaluate", path, "--data", "digits", "--json")
        assert answer.code == 0, answer.err
        accuracies[path] = json.loads(answer.out)["top1"]
    recorded = Bundle(tmp_path / "deploy").read().metrics["student"]["test"].top1
    assert set(accuracies.values()) == {recorded}

    assert json.loads(run("inspect", "deploy", "--json").out)["status"] == "complete"
    assert "CIFAR ResNet-8" in run("inspect", "deploy/student.safetensors").out
    assert json.loads(run("inspect", "deploy/export/student.onnx", "--json").out)["input_shape"] == ["batch", 1, 8, 8]


@pytest.mark.tensorrt
def test_engines_for_three_architectures_and_a_triton_repository(
    run: Run, compressed: Bundle, tmp_path: Path, target: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    options = ("--precision", "fp32,fp16", "--target", target, "--triton-repository", "models")
    answer = run("export", "--onnx", "--trt", *options)
    assert answer.code == 2
    assert "Name them: litdeploy export --trt --compute-capability 8.6,8.9,12.0" in answer.err
    assert not compressed.export_path.exists()

    answer = run("export", "--onnx", "--trt", *options, "--compute-capability", "8.6,8.9,12.0")
    assert answer.code == 0, answer.err
    for name in ("student.engine", "student.fp16.engine"):
        assert (compressed.export_path / name).is_file()
        assert f"export/{name}: left out of models" in answer.err
    assert "there is no CUDA GPU here" in answer.err
    assert answer.out.count("  not run here: built ahead of time for compute capability 8.6, 8.9, 12.0\n") == 2
    assert "weights: 100.0 % fp32 (as the network requires)" in answer.out
    assert sorted(folder.name for folder in (tmp_path / "models").iterdir()) == ["student-onnx", "student.fp16-onnx"]

    answer = run("export", "--trt", "--target", target, "--compute-capability", "9.0")
    assert answer.code == 2
    assert "--compute-capability 9.0: tensorrt_rtx" in answer.err
    answer = run("export", "--trt", "--target", target, "--compute-capability", "8.6", "--version-compatible")
    assert answer.code == 2
    assert "--version-compatible: tensorrt_rtx does not have it" in answer.err
    assert len(list(compressed.export_path.iterdir())) == 8


@pytest.mark.slow
def test_each_precision_is_exported_verified_and_evaluated(
    run: Run, compressed: Bundle, tmp_path: Path, target: Path
) -> None:
    options = ("--precision", "fp32, fp16,bf16,int8", "--embed-preprocessing", "--calibration-images", "64")
    answer = run("export", "--onnx", *options, "--target", target)
    assert answer.code == 0, answer.err
    for line in ("kept in fp32: linear", "a call of batch 1:", "student.bf16.onnx   opset 22   bf16"):
        assert line in answer.out
    answer = run("verify", "--target", target, "--bisect")
    assert answer.code == 0, answer.err
    rows = [line.split()[:2] for line in answer.out.splitlines()]
    for row in (["compression", "student"], ["conversion", "onnx"], ["conversion", "onnx-int8"]):
        assert row in rows
    assert "nothing to bisect" in answer.out

    found = json.loads(run("verify", "--target", target, "--artefact", "onnx-bf16", "--json").out)
    accuracies = {each["candidate"]: each["candidate_accuracy"]["top1"] for each in found["differences"]}
    assert set(accuracies) == {"student", "onnx-bf16"}
    answer = run("evaluate", "deploy/export/student.bf16.onnx", "--data", "digits", "--json")
    assert json.loads(answer.out)["top1"] == accuracies["onnx-bf16"]

    strict = tmp_path / "strict.yaml"
    strict.write_text(f"{TARGET}tolerance:\n  int8: {{atol: 0, rtol: 0}}\n")
    answer = run("verify", "--target", strict, "--artefact", "onnx-int8", "--bisect")
    assert answer.code == 3
    assert "student.int8.onnx.rejected: differs from " in answer.out
    assert "onnx-int8:" in answer.err
    assert "onnx-int8" not in compressed.read().artefacts


def test_deploy_goes_on_after_the_last_whole_stage(run: Run, teacher_path: Path, tmp_path: Path, target: Path) -> None:
    command = ("deploy", teacher_path, *COMPRESS, "--target", target)
    answer = run(*command)
    assert answer.code == 0, answer.err
    bundle = Bundle(tmp_path / "deploy")
    student = bundle.student_path.stat().st_mtime_ns
    report = (bundle.profile_path / "report.json").read_bytes()

    answer = run(*command)
    assert answer.code == 0
    for stage in ("trained already", "exported already", "profiled already"):
        assert stage in answer.err
    assert (bundle.profile_path / "report.json").read_bytes() == report

    (bundle.export_path / "student.onnx").unlink()
    answer = run(*command)
    assert answer.code == 0, answer.err
    assert "exported already" not in answer.err
    assert bundle.student_path.stat().st_mtime_ns == student

    answer = run(*command, "--seed", "5")
    assert answer.code == 2
    assert "holds another run" in answer.err
    assert bundle.student_path.stat().st_mtime_ns == student


def test_train_and_evaluate_with_a_gate(run: Run) -> None:
    answer = run("train", "resnet8,width=4", "--recipe", "digits-resnet-teacher", "--epochs", "1", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["path"] == "teacher.safetensors"
    assert run("evaluate", "teacher.safetensors", "--data", "digits").code == 0
    answer = run("evaluate", "teacher.safetensors", "--data", "digits", "--min-accuracy", "99.9")
    assert answer.code == 3
    assert "--min-accuracy" in answer.err


def test_inspect_names_the_network_its_sections_and_the_depths(run: Run, shared: Path) -> None:
    answer = run("inspect", shared / "teachers" / "cifar10-resnet56.th")
    assert answer.code == 0
    assert "CIFAR ResNet-56, shortcut A" in answer.out
    assert "classes      10" in answer.out
    for section in ("layer1", "layer2", "layer3"):
        assert any(line.split()[:2] == [section, "9"] for line in answer.out.splitlines())
    assert "--student-depth 8, 14, 20, 26, 32, 38, 44, 50, 56 (one; a chain: 50,8)" in answer.out


def test_texts_are_called_so(run: Run, reader_path: Path, tmp_path: Path) -> None:
    rows = "".join(f"number {row} is {'good' if row % 2 else 'bad'},{row % 2}\n" for row in range(60))
    (tmp_path / "texts.csv").write_text(f"text,label\n{rows}")
    (tmp_path / "target.yaml").write_text(
        "{device: cpu, runners: [eager], batch_sizes: [1, 4], timing: {warmup_ms: 1, samples: 8}}"
    )
    asked = ("--data", "texts.csv", "--text-length", "64", "--batch-size", "8", "--epochs", "2", "--device", "cpu")
    answers = [
        run("compress", reader_path, "--student-depth", "9", "--feature-cache", "1", *asked),
        run("evaluate", "deploy"),
        run("profile", "--target", "target.yaml"),
        run("inspect", reader_path),
    ]
    assert [answer.code for answer in answers] == [0, 0, 0, 0], answers
    assert all("image" not in answer.out + answer.err.replace("of images --normalise", "") for answer in answers)
    assert "1 view of 5" in answers[0].err
    assert " validation texts" in answers[0].err
    assert re.search(r"\d texts/s\n", answers[0].err)
    assert "throughput in texts/s" in answers[2].out
    page = (tmp_path / "deploy" / "profile" / "report.html").read_text()
    assert "FLOPs per text" in page
    page = re.sub(r"<(style|svg|pre).*?</\1>", "", page, flags=re.DOTALL)
    assert not re.findall(r"[^.<>]*\bimages?\b[^.<>]*", page)


def test_a_fault_of_ours_is_a_traceback_and_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("litdeploy.inspection.inspect", broken)
    with pytest.raises(ZeroDivisionError):
        run("inspect", "anything")
