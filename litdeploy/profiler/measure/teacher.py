"""A bundle's teacher, in the form that the student ships in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import ValidationError

from litdeploy.errors import RunnerError
from litdeploy.exporter import FORMS, export_onnx
from litdeploy.exporter.inductor import export_aoti
from litdeploy.exporter.staging import keep, staged
from litdeploy.exporter.tensorrt import EngineOptions, build_engine
from litdeploy.exporter.tensorrt_choice import choose_library
from litdeploy.files import is_file, read_small, sha256_of, write_whole
from litdeploy.networks import Network
from litdeploy.profiler.machine.environment import versions
from litdeploy.runtime.engine import BatchProfile, read_engine
from litdeploy.runtime.inductor import package_details
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Artefact, Record


class _Sidecar(Record):
    """What an exported teacher was made from; a file is used again only where all of it still holds."""

    teacher_sha256: str
    versions: dict[str, str]
    opset: int
    sha256: str


def teacher_onnx(bundle: Bundle, teacher: Network, teacher_sha256: str, opset: int) -> Path:
    """The teacher as ONNX in the bundle's `profile/`, exported as the student is; made once.

    Args:
        opset: the student's, so that both sides run the same operators.

    Raises:
        NetworkError, SettingsError: it cannot be exported so.
    """
    path = bundle.profile_path / "teacher.onnx"
    sidecar = path.with_suffix(".json")
    wanted = {"teacher_sha256": teacher_sha256, "versions": versions(), "opset": opset}
    if is_file(path) and is_file(sidecar):
        try:
            stored = _Sidecar.model_validate_json(read_small(sidecar))
        except (OSError, ValidationError):
            stored = None  # torn, or of another version: as good as none
        if stored and stored.model_dump() == {**wanted, "sha256": sha256_of(path)}:
            return path
    export_onnx(teacher, path, opset)
    with write_whole(sidecar) as temporary:
        temporary.write_text(json.dumps({**wanted, "sha256": sha256_of(path)}, indent=2) + "\n", encoding="utf-8")
    return path


def teacher_package(bundle: Bundle, teacher: Network, teacher_sha256: str, device: torch.device) -> Path:
    """The teacher as an AOTInductor package in the bundle's `profile/`, for this device; made once.

    Raises:
        NetworkError, RunnerError: it cannot be exported, or not be compiled here.
    """
    path = bundle.profile_path / "teacher.pt2"
    try:
        if package_details(path, device).get("teacher_sha256") == teacher_sha256:
            return path
    except RunnerError:
        pass  # none, torn, or built for something else
    with staged(path) as candidate:
        details = export_aoti(teacher, candidate, device)
        artefact = Artefact(
            path=path.relative_to(bundle.path).as_posix(),
            sha256=sha256_of(candidate),
            precision="fp32",
            versions=FORMS["aoti"].versions(),
            details={**details, "teacher_sha256": teacher_sha256},
        )
        keep(candidate, path, artefact)
    return path


def teacher_engine(
    bundle: Bundle, teacher: Network, teacher_sha256: str, student: Artefact, device: torch.device
) -> Path:
    """The teacher as a TensorRT engine in the bundle's `profile/`, for batches as the student's; made once.

    Args:
        student: the student's engine.

    Raises:
        NetworkError, DependencyError, RunnerError: it cannot be exported, or not be built here.
    """
    path = bundle.profile_path / "teacher.engine"
    choice = choose_library(device)
    try:
        batches = BatchProfile.model_validate(student.details.get("batches"))
    except ValidationError:
        raise RunnerError(
            f"{student.path}: the manifest does not say which batches it takes. Export it again: litdeploy export --trt"
        ) from None
    wanted = {
        "teacher_sha256": teacher_sha256,
        "chosen": choice.told(),
        "batches": batches.model_dump(mode="json"),
        "opset": student.opset(),
    }
    try:
        found = read_engine(path).artefact.details
        if all(found.get(key) == value for key, value in wanted.items()):
            return path
    except RunnerError:
        pass  # none, or torn
    with staged(path) as candidate:
        onnx_path = candidate.with_suffix(".onnx")
        export_onnx(teacher, onnx_path, student.opset())
        options = EngineOptions(
            "fp32", batches, memory_limit=student.details.get("memory_limit"), command="litdeploy profile"
        )
        built = build_engine(onnx_path, candidate, choice, options)
        details = {**built.details, **wanted}
        keep(candidate, path, built.model_copy(update={"path": f"profile/{path.name}", "details": details}))
    return path
