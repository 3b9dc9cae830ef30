"""From a bundle to a report, with networks that answer in a millisecond."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from litdeploy.config.recipe import DataSettings
from litdeploy.config.target import Target, Timing
from litdeploy.errors import BundleError, RunnerError
from litdeploy.exporter import export
from litdeploy.networks import build, load
from litdeploy.profiler import profile, read_report
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.storage.records import Artefact

from .conftest import Made

EAGER = Target(
    device="cpu", runners=("eager",), batch_sizes=(1, 2), timing=Timing(warmup_ms=1, samples=8, max_seconds=1)
)
ONNX = EAGER.model_copy(update={"runners": ("onnxruntime",), "batch_sizes": (1, 3)})


def test_eager(made: Made) -> None:
    lines: list[str] = []
    report = profile(made.bundle, target=EAGER, progress=lines.append)

    assert [(each.runner, each.batch_size) for each in report.measurements] == [("eager", 1), ("eager", 2)]
    assert len(lines) == 4
    assert all(each.teacher.samples == each.student.samples >= 2 for each in report.measurements)
    assert all(each.student.median_ms > 0 and each.comparison.speedup > 0 for each in report.measurements)
    assert (report.teacher.name, report.student.name) == ("ResNet-14", "ResNet-8")
    assert report.depth_ratio == 14 / 8
    assert report.flop_ratio > 1
    assert report.parity is None
    assert report.test_used_once
    assert [row["epoch"] for row in report.training] == [1, 2]
    assert report.student_sha256 == made.bundle.read().student_sha256
    assert report.headline.device == "cpu"
    assert report.commands[-1].endswith(f"--teacher {made.teacher}")

    assert report.fidelity is not None
    assert [each.name for each in report.fidelity.deviations][1:-1] == ["layer1", "layer2", "layer3"]

    folder = made.bundle.profile_path
    assert read_report(folder) == report
    assert report.headline.runner in (folder / "report.html").read_text(encoding="utf-8")
    [first, _] = json.loads((folder / "samples.json").read_text())["measurements"]
    assert len(first["timed"]["order"]) == 2 * report.measurements[0].teacher.samples


def test_without_a_training_record(made: Made) -> None:
    made.bundle.metrics_path.unlink()
    assert profile(made.bundle.path, target=EAGER).training == ()


def test_data_that_are_gone_cost_the_fidelity_and_no_more(made: Made, tmp_path: Path) -> None:
    manifest = made.bundle.read()
    gone = manifest.recipe.model_copy(update={"data": DataSettings(source=str(tmp_path / "gone"))})
    made.bundle.write(manifest.model_copy(update={"recipe": gone}))
    trace = tmp_path / "trace.json"
    report = profile(made.bundle, target=EAGER.model_copy(update={"batch_sizes": (1,)}), trace=trace)
    assert report.fidelity is None
    assert "gone" in (report.fidelity_missing or "")
    assert trace.is_file()


@pytest.mark.parametrize("cut", ["whole sections", "inside the blocks"])
def test_a_narrower_student(made: Made, cut: str) -> None:
    """Only section outputs of the teacher's shape can be compared with the teacher's."""
    spec, manifest = load(made.teacher).spec, made.bundle.read_complete()
    if cut == "whole sections":
        spec = spec.with_(arguments={**spec.arguments, "depth": 8, "width": 2})
    else:
        spec = spec.with_(
            plan={"layer1": (0, 1)},
            widths={"layer1.0.conv1": (2, 4, 3, 3), "layer1.0.bn1": (2,), "layer1.0.conv2": (4, 2, 3, 3)},
        )
    sha256 = write_checkpoint(made.bundle.student_path, build(spec, None, "test").state_dict(), spec)
    changed = {"student": spec, "student_sha256": sha256}
    made.bundle.write(manifest.model_copy(update=changed))
    report = profile(made.bundle, target=EAGER.model_copy(update={"batch_sizes": (1,)}))
    assert (report.fidelity is None) is (cut == "whole sections")
    assert "other shapes" in (report.fidelity_missing or "other shapes")
    assert report.flop_ratio > 1


def test_a_teacher_that_moved(made: Made) -> None:
    moved = made.teacher.rename(made.teacher.with_name("elsewhere.safetensors"))
    with pytest.raises(BundleError, match=r"--teacher FILE"):
        profile(made.bundle, target=EAGER)
    assert profile(made.bundle, teacher=moved, target=EAGER).teacher.path == str(moved)


def test_another_teacher_is_refused(made: Made) -> None:
    other = shutil.copy(made.bundle.student_path, made.teacher.with_name("other.safetensors"))
    with pytest.raises(BundleError, match="not the teacher"):
        profile(made.bundle, teacher=other, target=EAGER)


def test_onnxruntime_needs_an_export(made: Made) -> None:
    with pytest.raises(RunnerError, match=r"onnxruntime: .*litdeploy export .*deploy --onnx"):
        profile(made.bundle, target=ONNX)


def test_a_runner_that_fails_is_reported_and_the_others_are_measured(made: Made) -> None:
    lines: list[str] = []
    target = EAGER.model_copy(update={"runners": ("onnxruntime", "eager")})
    report = profile(made.bundle, target=target, progress=lines.append)
    assert [(each.runner, each.batch_size) for each in report.measurements] == [("eager", 1), ("eager", 2)]
    [failure] = report.failures
    assert (failure.runner, failure.batch_size) == ("onnxruntime", None)
    assert "--onnx" in failure.message
    assert any("left out" in line for line in lines)
    assert read_report(made.bundle.profile_path) == report


def test_onnxruntime_runs_what_ships(made: Made) -> None:
    export(made.bundle, target=ONNX)
    report = profile(made.bundle, target=ONNX)
    assert [(each.runner, each.batch_size) for each in report.measurements] == [("onnxruntime", 1), ("onnxruntime", 3)]
    assert report.headline.student.artefact == str(made.bundle.export_path / "student.onnx")
    assert report.parity is not None
    assert report.parity.within
    assert read_report(made.bundle.profile_path) == report


@pytest.mark.slow
def test_inductor_runs_a_package_of_each_side(made: Made) -> None:
    target = EAGER.model_copy(update={"runners": ("inductor",)})
    with pytest.raises(RunnerError, match=r"inductor: .*litdeploy export .*deploy --aoti"):
        profile(made.bundle, target=target)
    export(made.bundle, onnx=False, aoti=True, target=target)
    report = profile(made.bundle, target=target)
    assert [(each.runner, each.batch_size) for each in report.measurements] == [("inductor", 1), ("inductor", 2)]
    assert report.headline.student.artefact == str(made.bundle.export_path / "student.pt2")
    teacher = made.bundle.profile_path / "teacher.pt2"
    built = teacher.stat().st_mtime_ns
    profile(made.bundle, target=target)
    assert teacher.stat().st_mtime_ns == built


def test_an_altered_export_is_refused(made: Made) -> None:
    file = made.bundle.export_path / "student.onnx"
    file.parent.mkdir()
    file.write_bytes(b"altered")
    details = {"opset": 20}
    artefact = Artefact(path="export/student.onnx", sha256="0f" * 32, precision="fp32", versions={}, details=details)
    made.bundle.add_artefact("onnx", artefact)
    with pytest.raises(RunnerError, match="altered since it was exported"):
        profile(made.bundle, target=ONNX)
