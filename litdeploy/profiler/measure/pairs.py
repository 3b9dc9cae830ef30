"""A bundle's teacher and student, in the form that each runner takes."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import torch

from litdeploy.errors import BundleError
from litdeploy.exporter.forms import runs_here
from litdeploy.exporter.teacher import load_teacher
from litdeploy.networks import Network, NetworkName, load
from litdeploy.profiler.measure.measuring import FORM_OF, Pair, Program, Progress
from litdeploy.profiler.measure.teacher import teacher_engine, teacher_onnx, teacher_package
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle
from litdeploy.storage.records import Artefact, Manifest

_FORM_NAMES = {"onnx": "ONNX", "aoti": "AOTInductor package", "trt": "TensorRT engine"}


def load_both(
    bundle: Bundle, manifest: Manifest, teacher: str | Path | None, network: NetworkName | None
) -> dict[str, Network]:
    """`teacher` and `student`; the arguments are those of `profile`."""
    return {
        "teacher": load_teacher(bundle, manifest, teacher, network),
        "student": load(bundle.student_path, network=network),
    }


class BundlePairs:
    """Gives a runner both sides: the modules, or the student as it was exported and the teacher in the same form."""

    def __init__(
        self, bundle: Bundle, manifest: Manifest, networks: dict[str, Network], device: torch.device, say: Progress
    ) -> None:
        self._bundle, self._manifest, self._networks = bundle, manifest, networks
        self._device, self._say = device, say

    def __call__(self, runner: str) -> Pair:
        """Both sides for a runner.

        Raises:
            BundleError: the bundle holds no student in the form that it takes, or one for GPUs elsewhere.
        """
        form = FORM_OF.get(runner)
        if form is None:
            return Pair(Program(self._networks["teacher"]), Program(self._networks["student"]))
        if form not in self._manifest.artefacts:
            raise BundleError(
                f"{self._bundle.path}: holds no exported student, which the target's runner {runner} takes. Run "
                f"`litdeploy export{folder_argument(self._bundle)} --{form}` first."
            )
        artefact = self._manifest.artefacts[form]
        student = self._bundle.artefact_path(artefact)
        if not runs_here(artefact):
            raise BundleError(
                f"{student}: was built ahead of time for GPUs elsewhere. Export it on the machine that it is profiled "
                f"on: litdeploy export{folder_argument(self._bundle)} --{form}"
            )
        self._say(f"teacher as {_FORM_NAMES[form]}")
        started = time.time()
        teacher = _teacher_file(
            form, self._bundle, self._networks["teacher"], self._manifest.teacher.sha256, artefact, self._device
        )
        # One that was there from before took no time now, and how long it took then is not known.
        made = time.time() - started if teacher.stat().st_mtime >= started else None
        return Pair(Program(self._networks["teacher"], teacher, made), Program(self._networks["student"], student))


def _teacher_file(
    form: str, bundle: Bundle, teacher: Network, sha256: str, student: Artefact, device: torch.device
) -> Path:
    match form:
        case "trt":
            return teacher_engine(bundle, teacher, sha256, student, device)
        case "aoti":
            return teacher_package(bundle, teacher, sha256, device)
        case _:
            return teacher_onnx(bundle, teacher, sha256, student.opset())


def folder_argument(bundle: Bundle) -> str:
    """The bundle as a command's argument, with a blank before it; nothing where it is the default."""
    return "" if bundle.path == DEFAULT_PATH else f" {shlex.quote(str(bundle.path))}"
