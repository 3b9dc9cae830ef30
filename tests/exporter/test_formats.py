"""A format added in one file (`toy_format.py`) and one row shows up everywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import litdeploy
from litdeploy.config.formats import FORMATS, file_of, format_of, imported, kind_of, runners
from litdeploy.config.target import Target, Timing
from litdeploy.errors import BundleError, CheckpointError, ParityError, RunnerError, SettingsError
from litdeploy.evaluation.evaluate import evaluate, evaluate_retrieval
from litdeploy.evaluation.verify import verify
from litdeploy.networks import new
from litdeploy.profiler import predict, profile
from litdeploy.runtime import open_runner
from litdeploy.storage.bundle import Bundle, read_sidecar
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.storage.records import TeacherRecord
from tests.exporter import toy_format

HELP = """
from litdeploy.config.formats import FORMATS, Format, Option
FORMATS["toy"] = Format("Toy", "Write a toy.", ".toy", ("fp32",), (), "nowhere:build", {"toy": "nowhere:Toy"},
                        options=(Option("toy_shift", "--toy-shift", "Add a number.", "0"),))
import sys
from litdeploy.cli import app
try:
    app(["export", "--help"])
except SystemExit:
    pass
print(sorted({"torch", "onnx", "onnxruntime", "datasets", "numpy"} & sys.modules.keys()))
"""


def _timed(runner: str) -> Target:
    timing = Timing(warmup_ms=1, samples=16, max_seconds=1)
    return Target(device="cpu", runners=(runner,), batch_sizes=(1, 2), timing=timing)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "toy", toy_format.ROW)


@pytest.fixture
def taught(bundle: Bundle, tmp_path: Path) -> Bundle:
    """The bundle, with a teacher whose file is there."""
    made = new("resnet,depth=14,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=1)
    path = tmp_path / "teacher.safetensors"
    spec = made.spec.with_(classes=tuple("0123456789"))
    teacher = TeacherRecord(path=str(path), sha256=write_checkpoint(path, made.module.state_dict(), spec), spec=spec)
    bundle.write(bundle.read().model_copy(update={"teacher": teacher}))
    return bundle


@pytest.mark.usefixtures("toy")
def test_it_is_exported_verified_profiled_and_predicted(taught: Bundle) -> None:
    target = _timed("toy")
    manifest = litdeploy.export(taught, onnx=False, toy=True, target=target)
    artefact = manifest.artefacts["toy"]
    assert artefact.path == "export/student.toy"
    assert artefact.versions["toy"] == "1.0"
    assert artefact.details["command"].endswith("--toy --precision fp32")
    assert artefact.details["parity"]["within"]
    assert artefact.details["parity"]["candidate"] == "toy"
    assert read_sidecar(taught.artefact_path(artefact)) == artefact

    found = verify(taught, target=target)
    assert [each.candidate for each in found.differences] == ["student", "toy"]
    assert found.within

    lines: list[str] = []
    report = profile(taught, target=target, progress=lines.append)
    assert "teacher as Toy" in lines
    assert {each.runner for each in report.measurements} == {"toy"}
    teacher = taught.profile_path / "teacher.toy"
    built = teacher.stat().st_mtime_ns
    profile(taught, target=target)
    assert teacher.stat().st_mtime_ns == built
    # The student's file in its place is another network's.
    shutil.copy(taught.artefact_path(artefact), teacher)
    profile(taught, target=target)
    assert teacher.stat().st_mtime_ns != built

    [student] = predict(taught.read().teacher.path, [8], target=target).students
    assert {each.runner for each in student.measurements} == {"toy"}


@pytest.mark.usefixtures("toy")
def test_its_file_is_evaluated_alone(bundle: Bundle, tmp_path: Path) -> None:
    target = Target(device="cpu", batch_sizes=(1,))
    artefact = litdeploy.export(bundle, onnx=False, toy=True, target=target).artefacts["toy"]
    alone = shutil.copy(bundle.artefact_path(artefact), tmp_path / "alone.toy")
    assert evaluate(alone, data="digits", device="cpu") == evaluate(bundle.path, data="digits", device="cpu")
    with pytest.raises(SettingsError, match=r"alone\.toy outputs logits only"):
        evaluate_retrieval(alone, data="digits")


def test_an_engine_is_not_evaluated_alone(tmp_path: Path) -> None:
    (tmp_path / "student.engine").write_bytes(b"engine")
    with pytest.raises(CheckpointError, match=r"the ending '\.engine' is not one of a file of weights"):
        evaluate(tmp_path / "student.engine", data="digits", device="cpu")


@pytest.mark.usefixtures("toy")
def test_its_options_are_arguments_and_in_the_command(bundle: Bundle) -> None:
    with pytest.raises(ParityError, match=r"student\.toy does not compute"):
        litdeploy.export(bundle, onnx=False, toy=True, toy_shift="1", target=Target(device="cpu", batch_sizes=(1,)))
    sidecar = read_sidecar(bundle.export_path / "student.toy.rejected")
    assert sidecar.details["command"].endswith("--toy --precision fp32 --toy-shift 1")
    target = Target(device="cpu", compute_capability="8.6", batch_sizes=(1,))
    artefact = litdeploy.export(bundle, onnx=False, toy=True, target=target).artefacts["toy"]
    assert artefact.details["command"].endswith("--toy --precision fp32 --toy-word 8.6")
    with pytest.raises(SettingsError, match=r"--toy-shift is for Toy, which was not requested\. Add --toy"):
        litdeploy.export(bundle, toy_shift="1")
    with pytest.raises(SettingsError, match=r"--toy has no fp16; it has fp32\. .* --onnx --precision fp16"):
        litdeploy.export(bundle, toy=True, precisions=("fp16",), target=target)


@pytest.mark.usefixtures("toy")
def test_its_runner_is_known() -> None:
    assert Target(runners=("toy",)).runners == ("toy",)
    with pytest.raises(RunnerError, match=r"the format Toy: pass path=….*litdeploy export --toy"):
        open_runner("toy", device=toy_format.torch.device("cpu"))


def test_it_is_in_the_help_which_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert "--toy " in done.stdout
    assert "--toy-shift" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_unknown_runner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="no such runner; those known: eager, compiled, onnxruntime"):
        Target(runners=("toy",))


@pytest.mark.parametrize("arguments", [{"openvino": True}, {"toy_shift": "1"}])
def test_an_unknown_format_or_option_is_a_programming_error(bundle: Bundle, arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="no format and no option of one is called so"):
        litdeploy.export(bundle, **arguments)


@pytest.mark.parametrize("name", FORMATS)
def test_each_row_is_complete_and_has_names_of_its_own(name: str) -> None:
    row = FORMATS[name]
    for reference in (row.build, row.describe, row.check, row.identity, row.triton, *row.runners.values()):
        assert reference is None or imported(reference)
    assert row.runners.keys() <= runners().keys()
    assert row.versions()
    for precision in row.precisions:
        assert format_of(kind_of(name, precision)) == name
        assert file_of(name, precision).endswith(row.suffix)
    kinds = [kind_of(each, precision) for each in FORMATS for precision in FORMATS[each].precisions]
    files = [file_of(each, precision) for each in FORMATS for precision in FORMATS[each].precisions]
    assert len(set(kinds)) == len(set(files)) == len(kinds)


def test_the_first_file_keeps_its_name() -> None:
    assert (kind_of("onnx", "fp32"), file_of("onnx", "fp32")) == ("onnx", "student.onnx")
    assert (kind_of("onnx", "fp16"), file_of("onnx", "fp16")) == ("onnx-fp16", "student.fp16.onnx")


def test_an_artefact_of_an_unknown_format_is_refused() -> None:
    with pytest.raises(BundleError, match="known formats: onnx, aoti, trt"):
        format_of("toy-fp16")
