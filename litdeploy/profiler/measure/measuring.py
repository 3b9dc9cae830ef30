"""Teacher and student in the runners of a target; one that is missing or fails is reported and does not end it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from litdeploy.config.target import Target
from litdeploy.errors import LitdeployError, RunnerError
from litdeploy.exporter import FORMS
from litdeploy.networks import Network
from litdeploy.networks.batch import Batch, moved, size_of
from litdeploy.profiler.figures import milliseconds, times
from litdeploy.profiler.measure.device_times import device_times
from litdeploy.profiler.measure.memory import MemoryMeter
from litdeploy.profiler.measure.scenarios import scenario_of
from litdeploy.profiler.measure.statistics import compare, summarise
from litdeploy.profiler.measure.timing import measure
from litdeploy.profiler.schema import Failure, Measurement, RawSamples, Samples, SideTiming, Timed
from litdeploy.runtime import Runner, open_runner

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
