"""Teacher and student in the runners of a target; a runner that is missing or fails is reported and skipped."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import ValidationError

from litdeploy.batch import Batch, moved, size_of
from litdeploy.config.target import Target, Timing
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
from litdeploy.profiler.figures import milliseconds, times
from litdeploy.profiler.machine.conditions import versions
from litdeploy.profiler.measure.memory_meter import MemoryMeter
from litdeploy.profiler.measure.statistics import compare, summarize
from litdeploy.profiler.measure.timing import device_times, scenario_of, time_pair
from litdeploy.profiler.schema import Failure, Measurement, RawSamples, Samples, SideTiming, Timed
from litdeploy.runtime import Runner, open_runner
from litdeploy.runtime.engine import BatchProfile, read_engine
from litdeploy.runtime.inductor import package_details
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle
from litdeploy.storage.pickled import first_line
from litdeploy.storage.records import Artefact, Manifest, Record

# Runners that take an exported file and not the module → the form of export that makes it.
FORM_OF = {**{form.runner: name for name, form in FORMS.items()}, "onnxruntime-graph": "onnx", "tensorrt-graph": "trt"}
_FORM_NAMES = {"onnx": "ONNX", "aoti": "AOTInductor package", "trt": "TensorRT engine"}

# What a backend raises besides litdeploy's own errors: torch raises RuntimeError of all kinds, also out of memory.
_FAILURES = (LitdeployError, RuntimeError, MemoryError, OSError)


@dataclass(frozen=True)
class Program:
    """One side in one runner.

    Attributes:
        network: its module, or the network that its file was exported from.
        path: the exported file; None if the runner takes the module.
        build_seconds: how long building the file took; None if it was there already.
    """

    network: Network
    path: Path | None = None
    build_seconds: float | None = None

    def open(self, runner: str, device: torch.device, target: Target) -> Runner:
        """The runner of that name, not yet entered."""
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
    """The measurements, their raw samples, and the failures."""

    measurements: list[Measurement] = field(default_factory=list)
    samples: list[RawSamples] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def check(self) -> None:
        """Check that there is a measurement.

        Raises:
            RunnerError: there is none; the message lists the failures.
        """
        if not self.measurements:
            reasons = "\n".join(f"  {_where(failure)}: {failure.message}" for failure in self.failures)
            raise RunnerError(f"nothing could be measured in the target's runners:\n{reasons}")


def _where(failure: Failure) -> str:
    return failure.runner + (f", batch {failure.batch_size}" if failure.batch_size is not None else "")


def measure_runners(
    pair_for: Callable[[str], Pair], target: Target, device: torch.device, say: Callable[[str], None]
) -> Results:
    """Time both sides in every runner of the target, at every batch size.

    Args:
        pair_for: returns both sides for a runner, and builds their files; an error that it raises is a failure of
            that runner.
        say: called with a line for each measurement and failure.
    """
    results = Results()

    def failed(runner: str, batch_size: int | None, error: Exception) -> None:
        # The first line of torch's errors says what happened, the rest where in torch's own code.
        message = str(error) if isinstance(error, LitdeployError) else f"{type(error).__name__}: {first_line(error)}"
        failure = Failure(runner=runner, batch_size=batch_size, message=message)
        results.failures.append(failure)
        say(f"{_where(failure)}: left out: {message}")

    for runner in target.runners:
        try:
            for batch_size, found in _measure_runner(runner, pair_for(runner), target, device):
                if isinstance(found, Exception):
                    failed(runner, batch_size, found)
                    continue
                measurement, timed = found
                results.measurements.append(measurement)
                results.samples.append(RawSamples(runner=runner, batch_size=batch_size, timed=timed))
                say(_line(measurement))
        except _FAILURES as error:
            failed(runner, None, error)
    return results


def _measure_runner(
    name: str, pair: Pair, target: Target, device: torch.device
) -> Iterator[tuple[int, tuple[Measurement, Timed] | Exception]]:
    """Each batch size with its measurement and samples, or with the error."""
    programs = pair.teacher, pair.student
    meters = MemoryMeter(device), MemoryMeter(device)
    with ExitStack() as stack:
        runners = []
        for program, meter in zip(programs, meters, strict=True):
            with meter.charge():
                runners.append(stack.enter_context(program.open(name, device, target)))
        for batch_size in target.batch_sizes:
            batch = moved(pair.student.network.example(batch_size), device)
            try:
                timed = time_pair(runners[0], runners[1], batch, target.timing, memory=meters)
                teacher, student = (
                    _side(program, runner, samples, batch, meter)
                    for program, runner, samples, meter in zip(
                        programs, runners, (timed.teacher, timed.student), meters, strict=True
                    )
                )
            except _FAILURES as error:
                yield batch_size, error
            else:
                yield (
                    batch_size,
                    (_measurement(name, runners[1], batch_size, target.timing, timed, teacher, student), timed),
                )


def _measurement(
    name: str,
    runner: Runner,
    batch_size: int,
    timing: Timing,
    timed: Timed,
    teacher: SideTiming,
    student: SideTiming,
) -> Measurement:
    described = runner.describe()
    return Measurement(
        runner=name,
        mode=described.mode,
        device=str(runner.device),
        precision=described.precision,
        batch_size=batch_size,
        clock=timed.clock,
        scenario=scenario_of(timing),
        pace=timing.pace,
        stopped=timed.stopped,
        overhead_ms=timed.overhead_ms,
        conditions=timed.conditions,
        teacher=teacher,
        student=student,
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
        **summarize(samples.milliseconds, size_of(batch)).model_dump(),
        **device_times(runner, batch),
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


def load_both(
    bundle: Bundle, manifest: Manifest, teacher: str | Path | None, network: NetworkName | None
) -> dict[str, Network]:
    """`teacher` and `student` of a bundle; the arguments are those of `profile`."""
    return {
        "teacher": load_teacher(bundle, manifest, teacher, network),
        "student": load(bundle.student_path, network=network),
    }


def measure_bundle(
    bundle: Bundle,
    manifest: Manifest,
    networks: Mapping[str, Network],
    target: Target,
    device: torch.device,
    say: Callable[[str], None],
) -> Results:
    """Time a bundle's teacher and student in every runner of the target, at every batch size.

    Args:
        networks: from `load_both`.
    """
    return measure_runners(partial(_bundle_pair, bundle, manifest, networks, device, say), target, device, say)


def _bundle_pair(
    bundle: Bundle,
    manifest: Manifest,
    networks: Mapping[str, Network],
    device: torch.device,
    say: Callable[[str], None],
    runner: str,
) -> Pair:
    """Both sides for a runner: the modules, or the student's exported file and the teacher in the same form.

    Raises:
        BundleError: the student was not exported in this form, or for GPUs of other machines.
    """
    form = FORM_OF.get(runner)
    if form is None:
        return Pair(Program(networks["teacher"]), Program(networks["student"]))
    export = f"litdeploy export{folder_argument(bundle)} --{form}"
    if form not in manifest.artefacts:
        raise BundleError(
            f"{bundle.path}: has no student in the form that the target's runner {runner} takes. Run `{export}` first."
        )
    artefact = manifest.artefacts[form]
    student = bundle.artefact_path(artefact)
    if not runs_here(artefact):
        raise BundleError(
            f"{student}: was built for GPUs of other machines. Export it on the machine that runs the profile: {export}"
        )
    say(f"teacher as {_FORM_NAMES[form]}")
    started = time.time()
    teacher = _teacher_file(form, bundle, networks["teacher"], manifest.teacher.sha256, artefact, device)
    # A file from an earlier profile took no time now, and its build time is unknown.
    build_seconds = time.time() - started if teacher.stat().st_mtime >= started else None
    return Pair(Program(networks["teacher"], teacher, build_seconds), Program(networks["student"], student))


def folder_argument(bundle: Bundle) -> str:
    """The bundle as a command's argument, with a leading space; empty for the default bundle."""
    return "" if bundle.path == DEFAULT_PATH else f" {shlex.quote(str(bundle.path))}"


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
