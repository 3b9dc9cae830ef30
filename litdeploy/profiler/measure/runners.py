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
from litdeploy.config.formats import FORMATS, format_of_runner, imported
from litdeploy.config.target import Target, Timing
from litdeploy.errors import BundleError, LitdeployError, RunnerError, first_line
from litdeploy.exporter.build import IdentityFunction, Job, build_artefact
from litdeploy.exporter.teacher import load_teacher
from litdeploy.files import is_file, sha256_of
from litdeploy.networks import Network, NetworkName, load
from litdeploy.profiler.formatting import milliseconds, times
from litdeploy.profiler.machine.conditions import versions
from litdeploy.profiler.measure.memory_meter import MemoryMeter
from litdeploy.profiler.measure.statistics import compare_sides, summarize
from litdeploy.profiler.measure.timing import device_times, scenario_of, time_pair
from litdeploy.profiler.schema import Failure, Measurement, RawSamples, Samples, SideTiming, Timed
from litdeploy.runtime import Runner, open_runner
from litdeploy.runtime.engine import BatchProfile
from litdeploy.storage.bundle import DEFAULT_PATH, Bundle, read_sidecar
from litdeploy.storage.records import Artefact, Manifest
from litdeploy.storage.staging import keep, staged

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
        return open_runner(
            runner,
            network=self.network,
            path=self.path,
            device=device,
            compile_mode=target.compile_mode,
            memory_limit=target.memory_limit,
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
        comparison=compare_sides(
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
    """Both sides for a runner: the modules, or the student's exported file and the teacher in the same format.

    Raises:
        BundleError: the student was not exported in this format, or for GPUs of other machines.
    """
    name = format_of_runner(runner)
    if name is None:
        return Pair(Program(networks["teacher"]), Program(networks["student"]))
    export = f"litdeploy export{folder_argument(bundle)} --{name}"
    if name not in manifest.artefacts:
        raise BundleError(
            f"{bundle.path}: has no student in the format that the target's runner {runner} takes. Run `{export}` "
            "first."
        )
    artefact = manifest.artefacts[name]
    student = bundle.artefact_path(artefact)
    if not artefact.runs_here:
        raise BundleError(
            f"{student}: was built for GPUs of other machines. Export it on the machine that runs the profile: {export}"
        )
    say(f"teacher as {FORMATS[name].title}")
    started = time.time()
    teacher = teacher_file(name, bundle, networks["teacher"], manifest.teacher.sha256, artefact, device)
    # A file from an earlier profile took no time now, and its build time is unknown.
    build_seconds = time.time() - started if teacher.stat().st_mtime >= started else None
    return Pair(Program(networks["teacher"], teacher, build_seconds), Program(networks["student"], student))


def folder_argument(bundle: Bundle) -> str:
    """The bundle as a command's argument, with a leading space; empty for the default bundle."""
    return "" if bundle.path == DEFAULT_PATH else f" {shlex.quote(str(bundle.path))}"


def teacher_file(
    name: str, bundle: Bundle, teacher: Network, teacher_sha256: str, student: Artefact, device: torch.device
) -> Path:
    """The teacher in a format, in the bundle's `profile/`, exported as the student is; built once.

    It is built again if its file is torn, or if it was built from another teacher, on another machine, with other
    libraries, or unlike the student.

    Args:
        name: key of `FORMATS`.
        student: the student's file in that format.

    Raises:
        LitdeployError: it cannot be exported or built here, or the manifest does not say how the student was.
    """
    row = FORMATS[name]
    options = row.defaults()
    path = bundle.profile_path / f"teacher{row.suffix}"
    alike = {key: _ALIKE[key](student) for key in row.alike}
    made_from = {"teacher_sha256": teacher_sha256, "versions": versions(), **alike}
    if row.identity is not None:
        identity: IdentityFunction = imported(row.identity)
        made_from |= identity(device, options)
    if _is_made_from(path, made_from):
        return path
    target = Target().model_copy(update=alike)
    with staged(path) as candidate:
        job = Job(teacher, target, device, options=options, command="litdeploy profile")
        label = path.relative_to(bundle.path).as_posix()
        keep(candidate, path, build_artefact(name, job, candidate, label, made_from=made_from))
    return path


def _is_made_from(path: Path, made_from: dict[str, Any]) -> bool:
    """Whether a file is whole, and its sidecar says that it was made from this."""
    try:
        artefact = read_sidecar(path)
    except (OSError, ValidationError):
        return False  # none, torn, or of another version
    same = artefact.details.get("made_from") == json.loads(json.dumps(made_from))
    return same and is_file(path) and sha256_of(path) == artefact.sha256


def _batch_sizes(student: Artefact) -> list[int]:
    try:
        batches = BatchProfile.model_validate(student.details.get("batches"))
    except ValidationError:
        raise RunnerError(
            f"{student.path}: the manifest does not say which batches it takes. Export it again: litdeploy export --trt"
        ) from None
    return [batches.min, batches.opt, batches.max]


def _memory_limit(student: Artefact) -> float | None:
    limit = student.details.get("memory_limit")
    return limit / 2**30 if isinstance(limit, int) else None


# Settings of a target → their values for an exported student, so that both sides run the same operators and batches.
_ALIKE: dict[str, Callable[[Artefact], Any]] = {
    "opset": Artefact.opset,
    "batch_sizes": _batch_sizes,
    "memory_limit": _memory_limit,
}
