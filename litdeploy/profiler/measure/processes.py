"""The whole measurement repeated in fresh processes, and their results as one.

Memory layout and a library's choice of kernels are drawn anew at each start and then kept, so no sample of one process
shows their effect (Kalibera and Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013). A child process is
`python -m litdeploy.profiler.measure.processes JOB RESULT`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from pydantic import Field
from torch import nn

from litdeploy.config.target import Target
from litdeploy.errors import LitdeployError, RunnerError, SettingsError
from litdeploy.networks import NetworkName
from litdeploy.profiler.machine.cores import pinned
from litdeploy.profiler.measure.runners import Results, load_both, measure_bundle
from litdeploy.profiler.measure.statistics import across_processes, judge, summarize
from litdeploy.profiler.schema import (
    Comparison,
    Conditions,
    Failure,
    Measurement,
    RawSamples,
    Samples,
    SideTiming,
    Stopped,
)
from litdeploy.runtime import resolve_device
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Record

_TAIL = 2_000  # characters of a failed child's stderr that the error shows

_Item = TypeVar("_Item")


class _Job(Record):
    """The input of a child process."""

    bundle: str
    teacher: str
    target: Target
    network: str | None
    threads: int


class _Result(Record):
    """The output of a child process; `error` is set if it could not begin to measure."""

    results: Results = Field(default_factory=Results)
    error: str | None = None


def measure_in_processes(
    bundle: Bundle, teacher: str, target: Target, network: NetworkName | None, say: Callable[[str], None]
) -> Results:
    """Measure a bundle in `target.timing.processes` fresh processes, one after the other, and merge the results.

    Args:
        teacher: the teacher's file.
        network: the network, if it is the user's own code; another process must be able to import it.

    Raises:
        SettingsError: another process cannot import the network.
        RunnerError: a process failed.
    """
    count = target.timing.processes
    job = _Job(
        bundle=str(bundle.path),
        teacher=teacher,
        target=target.model_copy(update={"timing": target.timing.model_copy(update={"processes": 1})}),
        network=_importable(network),
        threads=torch.get_num_threads(),
    )
    results = []
    with TemporaryDirectory(prefix="litdeploy-") as folder:
        for number in range(count):
            say(f"process {number + 1} of {count}")
            results.append(_run(job, Path(folder), say))
    return merge(results)


def _importable(network: NetworkName | None) -> str | None:
    """The network as text."""
    if network is None or isinstance(network, str):
        return network
    text = f"{network.__module__}:{getattr(network, '__qualname__', '<locals>')}"
    if isinstance(network, nn.Module) or "<" in text or text.startswith("__main__:"):
        raise SettingsError(
            "processes: a fresh process cannot import this network. Put its class or function into a module of its "
            "own, and pass network='package.module:function'."
        )
    return text


def _run(job: _Job, folder: Path, say: Callable[[str], None]) -> Results:
    job_path, result_path = folder / "job.json", folder / "result.json"
    job_path.write_text(job.model_dump_json(), encoding="utf-8")
    result_path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "litdeploy.profiler.measure.processes", str(job_path), str(result_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with (
        (folder / "errors.txt").open("w+", encoding="utf-8", errors="replace") as errors,
        # litdeploy's own module, run by this interpreter.
        subprocess.Popen(  # noqa: S603
            command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            say(line.rstrip("\n"))
        status = child.wait()
        errors.seek(0)
        stderr = errors.read()
    if not result_path.is_file():
        raise RunnerError(f"a measuring process ended with status {status}:\n{stderr[-_TAIL:].strip()}")
    result = _Result.model_validate_json(result_path.read_bytes())
    if result.error is not None:
        raise RunnerError(result.error)
    return result.results


def main(job_path: Path, result_path: Path) -> None:
    """The work of a child process."""
    job = _Job.model_validate_json(job_path.read_bytes())
    torch.set_num_threads(job.threads)
    try:
        result = _Result(results=_measure(job))
    except LitdeployError as error:
        result = _Result(error=str(error))
    partial = result_path.with_suffix(".partial")
    partial.write_text(result.model_dump_json(), encoding="utf-8")
    partial.replace(result_path)


def _measure(job: _Job) -> Results:
    def say(line: str) -> None:
        print(line, flush=True)

    bundle, device = Bundle(job.bundle), resolve_device(job.target.device)
    manifest = bundle.read_complete()
    networks = load_both(bundle, manifest, job.teacher, job.network)
    with pinned(torch.get_num_threads()):
        return measure_bundle(bundle, manifest, networks, job.target, device, say)


def merge(results: Sequence[Results]) -> Results:
    """Merge the results of several processes into one, whose intervals include the spread between them.

    What one of the processes could not measure is a failure, and not among the measurements.
    """
    merged = Results()
    failures: dict[tuple[str, int | None], Failure] = {}
    for each in results:
        failures |= {(failure.runner, failure.batch_size): failure for failure in each.failures}
    merged.failures = list(failures.values())
    for first in results[0].measurements:
        key = (first.runner, first.batch_size)
        members = [found for each in results for found in each.measurements if (found.runner, found.batch_size) == key]
        raw = [found for each in results for found in each.samples if (found.runner, found.batch_size) == key]
        if len(members) == len(results):
            merged.measurements.append(_merge_measurements(members, raw))
            merged.samples += [each.model_copy(update={"process": number}) for number, each in enumerate(raw)]
    return merged


def _merge_measurements(members: Sequence[Measurement], raw: Sequence[RawSamples]) -> Measurement:
    first = members[0]
    return first.model_copy(
        update={
            "stopped": _stopped([each.stopped for each in members]),
            "overhead_ms": median(each.overhead_ms for each in members),
            "conditions": _conditions([each.conditions for each in members]),
            "teacher": _side([each.teacher for each in members], [each.timed.teacher for each in raw], first),
            "student": _side([each.student for each in members], [each.timed.student for each in raw], first),
            "comparison": _comparison([each.comparison for each in members], raw),
        }
    )


def _stopped(each: Sequence[Stopped]) -> Stopped:
    """The worst: `settled` only if all are."""
    return next(kind for kind in ("time limit", "samples", "settled") if kind in each)


def _side(sides: Sequence[SideTiming], samples: Sequence[Samples], measurement: Measurement) -> SideTiming:
    pooled = [value for each in samples for value in each.milliseconds]
    summary = summarize(pooled, measurement.batch_size).model_dump()
    values = [(each.median_ms, each.median_low_ms, each.median_high_ms) for each in sides]
    _, low, high = across_processes(values)
    if low is not None and high is not None:
        # The median of all samples is not exactly the mean of the medians.
        low, high = min(low, summary["median_ms"]), max(high, summary["median_ms"])
    summary |= {"median_low_ms": low, "median_high_ms": high}
    medians = ("launch_ms", "cpu_ms", "copy_in_ms", "copy_out_ms", "end_to_end_ms", "captured_ms", "energy_joules")
    return sides[0].model_copy(
        update={
            **summary,
            **{name: _known(sides, attrgetter(name), median) for name in medians},
            "load_seconds": median(side.load_seconds for side in sides),
            "first_run_ms": median(side.first_run_ms for side in sides),
            "build_seconds": _known(sides, lambda side: side.build_seconds, max),
            "peak_memory_bytes": _known(sides, lambda side: side.peak_memory_bytes, max),
        }
    )


def _comparison(each: Sequence[Comparison], raw: Sequence[RawSamples]) -> Comparison:
    speedup, low, high = across_processes([(one.speedup, one.speedup_low, one.speedup_high) for one in each])
    paired, _, _ = across_processes([(one.paired_speedup, None, None) for one in each])
    cpu = _known(each, lambda one: one.cpu_speedup, median)
    samples = sum(len(one.timed.teacher.milliseconds) for one in raw)
    contended = any(one.timed.conditions.contended for one in raw)
    verdict, reason = judge(speedup, low, high, samples, cpu if contended else None)
    return Comparison(
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        paired_speedup=paired,
        cpu_speedup=cpu,
        verdict=verdict,
        reason=reason,
        processes=tuple(one.speedup for one in each),
    )


def _conditions(each: Sequence[Conditions]) -> Conditions:
    """Sums of times and counts, and the highest of the loads."""
    return Conditions(
        seconds=sum(one.seconds for one in each),
        cores=each[0].cores,
        other_load=_known(each, lambda one: one.other_load, max),
        machine_load=_known(each, lambda one: one.machine_load, max),
        stolen=_known(each, lambda one: one.stolen, max),
        preemptions=_known(each, lambda one: one.preemptions, sum),
        cpu_seconds=_known(each, lambda one: one.cpu_seconds, sum),
        waiting_seconds=_known(each, lambda one: one.waiting_seconds, sum),
        quota_seconds=_known(each, lambda one: one.quota_seconds, sum),
        clock_mhz=_known(each, lambda one: one.clock_mhz, median),
        clock_low_mhz=_known(each, lambda one: one.clock_low_mhz, min),
        gpu=next((one.gpu for one in each if one.gpu is not None), None),
    )


def _known(
    items: Sequence[_Item], field: Callable[[_Item], float | None], how: Callable[[list[float]], float]
) -> float | None:
    """`how` over the values that are not None; None if there is none."""
    known = [value for item in items if (value := field(item)) is not None]
    return how(known) if known else None


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
