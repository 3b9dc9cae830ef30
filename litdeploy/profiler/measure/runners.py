"""Teacher and student in the runners of a target; one that is missing or fails is reported and does not end it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import ValidationError

from litdeploy.config.target import Target
from litdeploy.errors import BundleError, LitdeployError, RunnerError
from litdeploy.exporter import FORMS, export_onnx
from litdeploy.exporter.forms import runs_here
from litdeploy.exporter.inductor import export_aoti
from litdeploy.exporter.staging import keep, staged
from litdeploy.exporter.teacher import load_teacher
from litdeploy.exporter.tensorrt import EngineOptions, build_engine
from litdeploy.exporter.tensorrt_choice import choose_library
from litdeploy.files import is_file, read_small, sha256_of, write_whole
from litdeploy.networks import Network, NetworkName, load
from litdeploy.networks.batch import Batch, moved, size_of
from litdeploy.profiler.figures import milliseconds, times
from litdeploy.profiler.machine.conditions import versions
from litdeploy.profiler.measure.memory_meter import MemoryMeter
from litdeploy.profiler.measure.statistics import compare, summarise
from litdeploy.profiler.measure.timing import device_times, measure, scenario_of
from litdeploy.profiler.schema import Failure, Measurement, RawSamples, Samples, SideTiming, Timed
from litdeploy.runtime import Runner, open_runner
from litdeploy.runtime.engine import BatchProfile, read_engine
from litdeploy.runtime.inductor import package_details
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle
from litdeploy.storage.records import Artefact, Manifest, Record

Progress = Callable[[str], None]

# Runners that take an exported file and not the module, each with the form of export that makes it.
FORM_OF = {**{form.runner: name for name, form in FORMS.items()}, "onnxruntime-graph": "onnx", "tensorrt-graph": "trt"}

# What a backend raises beside litdeploy's own errors: torch's of all kinds, also when its memory is full.
_FAILURES = (LitdeployError, RuntimeError, MemoryError, OSError)


@dataclass(frozen=True)
class Program:
    """One side in one runner.

    Attributes:
        network: its module, or what its file was exported from.
        path: the exported file; None where the runner takes the module.
        build_seconds: that making the file took now; None where it was there.
    """

    network: Network
    path: Path | None = None
    build_seconds: float | None = None

    def open(self, runner: str, device: torch.device, target: Target) -> Runner:
        """The runner of that name, to be entered."""
        source: dict[str, Any] = (
            {"network": self.network} if self.path is None else {FORMS[FORM_OF[runner]].source: self.path}
        )
        return open_runner(
            runner, **source, device=device, compile_mode=target.compile_mode, memory_limit=target.memory_limit
        )


@dataclass(frozen=True)
class Pair:
    """Both sides in one runner."""

    teacher: Program
    student: Program


@dataclass
class Results:
    """What was measured, and what could not be."""

    measurements: list[Measurement] = field(default_factory=list)
    samples: list[RawSamples] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def check(self) -> None:
        """Makes sure that something was measured.

        Raises:
            RunnerError: nothing was; it says why of each.
        """
        if not self.measurements:
            told = "\n".join(f"  {_where(failure)}: {failure.message}" for failure in self.failures)
            raise RunnerError(f"nothing could be measured in the target's runners:\n{told}")


def _where(failure: Failure) -> str:
    return failure.runner + (f", batch {failure.batch_size}" if failure.batch_size is not None else "")


def measure_runners(pairs: Callable[[str], Pair], target: Target, device: torch.device, say: Progress) -> Results:
    """Times both sides in every runner of the target, at every batch size.

    Args:
        pairs: gives both sides for a runner, and makes what it needs; what it raises is a failure of that runner.
    """
    results = Results()
    for runner in target.runners:
        try:
            _measure_runner(runner, pairs(runner), target, device, results, say)
        except _FAILURES as error:
            _fail(results, runner, None, error, say)
    return results


def _measure_runner(
    name: str, pair: Pair, target: Target, device: torch.device, results: Results, say: Progress
) -> None:
    meters = MemoryMeter(device), MemoryMeter(device)
    with ExitStack() as stack:
        runners = []
        for program, meter in zip((pair.teacher, pair.student), meters, strict=True):
            with meter.adding():
                runners.append(stack.enter_context(program.open(name, device, target)))
        teacher, student = runners
        for batch_size in target.batch_sizes:
            batch = moved(pair.student.network.example(batch_size), device)
            try:
                timed = measure(teacher, student, batch, target.timing, memory=meters)
                sides = [
                    _side(program, runner, samples, batch, meter)
                    for program, runner, samples, meter in zip(
                        (pair.teacher, pair.student), runners, (timed.teacher, timed.student), meters, strict=True
                    )
                ]
            except _FAILURES as error:
                _fail(results, name, batch_size, error, say)
                continue
            measurement = _measurement(name, student, timed, batch_size, sides, target)
            results.measurements.append(measurement)
            results.samples.append(RawSamples(runner=name, batch_size=batch_size, timed=timed))
            say(_line(measurement))


def _measurement(
    name: str, student: Runner, timed: Timed, batch_size: int, sides: list[SideTiming], target: Target
) -> Measurement:
    described = student.describe()
    return Measurement(
        runner=name,
        mode=described.mode,
        device=str(student.device),
        precision=described.precision,
        batch_size=batch_size,
        clock=timed.clock,
        scenario=scenario_of(target.timing),
        pace=target.timing.pace,
        stopped=timed.stopped,
        overhead_ms=timed.overhead_ms,
        conditions=timed.conditions,
        teacher=sides[0],
        student=sides[1],
        comparison=compare(
            timed.teacher.milliseconds,
            timed.student.milliseconds,
            timed.teacher.cpu_ms,
            timed.student.cpu_ms,
            contended=timed.conditions.contended,
        ),
    )


def _side(program: Program, runner: Runner, samples: Samples, batch: Batch, meter: MemoryMeter) -> SideTiming:
    return SideTiming(
        **summarise(samples.milliseconds, size_of(batch)).model_dump(),
        **asdict(device_times(runner, batch)),
        launch_ms=_median(samples.launch_ms),
        cpu_ms=_median(samples.cpu_ms),
        load_seconds=runner.describe().build_seconds,
        build_seconds=program.build_seconds,
        first_run_ms=samples.first_run_ms,
        peak_memory_bytes=meter.peak_bytes,
        artefact=None if program.path is None else str(program.path),
    )


def _median(values: tuple[float, ...]) -> float | None:
    return median(values) if values else None


def _line(measured: Measurement) -> str:
    teacher, student = measured.teacher.median_ms, measured.student.median_ms
    return (
        f"{measured.runner}, batch {measured.batch_size}: teacher {milliseconds(teacher)} ms, "
        f"student {milliseconds(student)} ms, {times(measured.comparison.speedup)} ({measured.comparison.verdict}; "
        f"{measured.student.samples} samples, {measured.stopped})"
    )


def _fail(results: Results, runner: str, batch_size: int | None, error: Exception, say: Progress) -> None:
    # Of torch's errors the first line says what, and the others where in its own code.
    message = str(error) if isinstance(error, LitdeployError) else f"{type(error).__name__}: {_first_line(error)}"
    failure = Failure(runner=runner, batch_size=batch_size, message=message)
    results.failures.append(failure)
    say(f"{_where(failure)}: left out: {message}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "without a message"


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
