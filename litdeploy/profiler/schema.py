"""The records of report.json (and of samples.json and a prediction), and how a report is read back.

They import nothing else of the profiler: `machine`, `measure` and `analysis` make them, `report` shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import DepthPlan, Noun
from litdeploy.config.target import Target
from litdeploy.errors import BundleError
from litdeploy.files import MOST_RECORD_BYTES, parse_json, read_small
from litdeploy.storage.records import Ancestor, DataRecord, Parity, Record, ScoredRecord

SCHEMA_VERSION: Literal[2] = 2
REPORT_NAME = "report.json"

REMAINDER = "stem and head"

_MUCH = 0.1  # of the time that threads can run

Clock = Literal["wall", "device"]
Scenario = Literal["warm", "cold cache", "paced"]
Stopped = Literal["settled", "time limit", "samples"]
Verdict = Literal["faster", "same", "slower", "unclear"]
Kind = Literal[
    "ideal ratio",
    "arithmetic-bound",
    "memory-bound",
    "overhead-bound",
    "launch-bound",
    "copy-bound",
    "throttled",
    "noisy neighbour",
    "drift",
    "behind pace",
]


class Environment(Record):
    """The machine and its software when the measurement began.

    Attributes:
        device: `cpu`, `cuda:0`, …
        device_name: name of the processor or GPU.
        cores: how many cores this process may use.
        threads: number of threads that PyTorch computes with on the CPU.
        load_average: runnable processes in the last minute before it; None if the system does not report them.
        date: ISO 8601, UTC.
        versions: library → version.
    """

    device: str
    device_name: str
    cores: int
    threads: int
    load_average: float | None
    system: str
    python: str
    litdeploy: str
    versions: dict[str, str]
    date: str


class Gpu(Record):
    """State of a GPU during a measurement.

    Attributes:
        clock_mhz, clock_low_mhz: clock of its multiprocessors: median and minimum.
        max_clock_mhz: the highest clock that it supports.
        memory_clock_mhz: median.
        temperature_c: maximum.
        power_watts: median.
        throttle_reasons: why its clocks were lowered; empty if they were not.
    """

    clock_mhz: float
    clock_low_mhz: float
    max_clock_mhz: float
    memory_clock_mhz: float
    temperature_c: float
    power_watts: float
    throttle_reasons: tuple[str, ...]


class Conditions(Record):
    """State of the machine during one measurement. A value is None if the system does not report it.

    Attributes:
        seconds: duration, without warm-up.
        cores: the cores this process ran on; more than its threads if it was not pinned.
        other_load: work of other processes on these cores, in cores.
        machine_load: the same on all cores of the machine; they share memory and the last-level cache with these.
        stolen: share of these cores' time that the hypervisor gave to other machines.
        preemptions: how often another process took the core during work (involuntary context switches).
        cpu_seconds: processor time of this process, all threads.
        waiting_seconds: time that this process's threads were ready to run and had no core.
        quota_seconds: time that the process was stopped for after it used up its CPU quota (cgroup).
        clock_mhz, clock_low_mhz: clock of these cores: median and minimum.
        gpu: state of the GPU that it ran on; None on a CPU, and without NVML.
    """

    seconds: float
    cores: tuple[int, ...] | None = None
    other_load: float | None = None
    machine_load: float | None = None
    stolen: float | None = None
    preemptions: int | None = None
    cpu_seconds: float | None = None
    waiting_seconds: float | None = None
    quota_seconds: float | None = None
    clock_mhz: float | None = None
    clock_low_mhz: float | None = None
    gpu: Gpu | None = None

    @property
    def contended(self) -> bool:
        """Whether its threads waited for a core during much of the time that they could have run (sleep excluded)."""
        waited, worked = self.waiting_seconds or 0.0, self.cpu_seconds or 0.0
        return waited >= _MUCH * (waited + worked) > 0 and waited + worked >= (1 - _MUCH) * self.seconds


class Part(Record):
    """One section, or everything outside the sections.

    Attributes:
        name: the section's container, or `stem and head`.
        blocks: number of its blocks; None for `stem and head`.
        parameters: number of trainable values.
        flops: floating-point operations for one image.
    """

    name: str
    blocks: int | None
    parameters: int
    flops: int


class Breakdown(Record):
    """Size of a network.

    Attributes:
        depth: number of weighted layers as the network's family counts them (`depth_unit` layers), or the number of
            blocks in all sections.
        parameters: number of trainable values.
        flops: floating-point operations for one image: two for each multiply-add of convolutions, matrix products and
            attention. Elementwise operations (batch norm, activations, additions) are not counted, as is usual.
        parts: the sections in the network's order, then `stem and head`; they sum up to the totals.
    """

    depth: int
    depth_unit: Literal["layers", "blocks"]
    parameters: int
    flops: int
    parts: tuple[Part, ...]


class Side(ScoredRecord):
    """The teacher or the student.

    Attributes:
        name: display name: `ResNet-20`.
        network: value for `--network`; a student has its teacher's.
        plan: the blocks that a student kept; None for a teacher.
        path, sha256, bytes: the file of weights.
        breakdown: depth, parameters, FLOPs.
    """

    name: str
    network: str
    plan: DepthPlan | None
    path: str
    sha256: str
    bytes: int
    breakdown: Breakdown


class Summary(Record):
    """Times of one side, in milliseconds per call.

    Attributes:
        samples: number of timed calls.
        median_ms: median of all samples.
        median_low_ms, median_high_ms: 95 % interval of the median; None from fewer than 6 samples. See
            `median_interval`.
        q1_ms, q3_ms: the quartiles; the middle half of the samples is between them.
        p90_ms, p95_ms, p99_ms, p99_9_ms: percentiles; None from fewer than 64, 130, 662 or 6,636 samples.
        images_per_second: batch size over median.
    """

    samples: int
    median_ms: float
    median_low_ms: float | None
    median_high_ms: float | None
    q1_ms: float
    q3_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    p99_9_ms: float | None
    images_per_second: float


class SideTiming(Summary):
    """Times of one side in one runner.

    Attributes:
        launch_ms: host time until the call returns, median; None if the call returns when it is finished (on a CPU). If
            it is not clearly below `median_ms`, the device waits for the host.
        cpu_ms: processor time of a call, all threads, median; None on the device's clock. If it is well below
            `median_ms` times the threads, calls wait for a core that other work occupies, or threads for one another.
        copy_in_ms, copy_out_ms: time to copy a batch to the device and its logits to the host, medians; None if nothing
            is copied.
        end_to_end_ms: host time from a batch in host memory to logits in host memory, median; None if nothing is
            copied.
        captured_ms: device time of the same call replayed as a CUDA graph, median; None on a CPU, and if it cannot be
            captured. Never the headline.
        load_seconds: time to open the runner (read the file, move the module); the same for all batch sizes.
        build_seconds: time to build the exported file; None if this profile did not build it. What the runner
            `compiled` compiles is in `first_run_ms`.
        first_run_ms: time of the first call with this batch size; not among the samples.
        peak_memory_bytes: the most memory that this side added for loading and for the first runs with this batch size
            and those before it: resident memory of the process on a CPU, device memory on CUDA; None if the system does
            not report it.
        energy_joules: energy of the whole GPU for one call; None without NVML.
        artefact: the exported file that ran; None if the runner took the module.
    """

    launch_ms: float | None = None
    cpu_ms: float | None = None
    copy_in_ms: float | None = None
    copy_out_ms: float | None = None
    end_to_end_ms: float | None = None
    captured_ms: float | None = None
    load_seconds: float
    build_seconds: float | None = None
    first_run_ms: float
    peak_memory_bytes: int | None = None
    energy_joules: float | None = None
    artefact: str | None


class Comparison(Record):
    """Teacher compared with student.

    Attributes:
        speedup: median of the teacher over median of the student; above 1 the student is faster. This is the headline.
            With several processes, their geometric mean.
        speedup_low, speedup_high: its 95 % interval, by bootstrap over blocks of calls made side by side; with several
            processes it includes the spread between them. None from fewer than 4 blocks.
        paired_speedup: the same ratio within each block, median over the blocks. If it is far from `speedup`, the
            machine changed during the measurement.
        cpu_speedup: the ratio of the medians of processor time; None on the device's clock.
        verdict: `faster` or `slower` if the whole interval is 2 % or more from 1; `same` if all of it is within 5 % of
            1; else `unclear`. It is also `unclear` if calls waited for a core and the speed-up is far from the one in
            processor time: long calls lose the core more often than short ones.
        reason: why it is `unclear`; else None.
        processes: the speed-up in each fresh process; empty with one process.
    """

    speedup: float
    speedup_low: float | None
    speedup_high: float | None
    paired_speedup: float
    cpu_speedup: float | None = None
    verdict: Verdict
    reason: str | None
    processes: tuple[float, ...] = ()


class Measurement(Record):
    """Teacher and student in one runner with one batch size.

    Attributes:
        runner: `eager`, `compiled`, `onnxruntime`, …
        mode: how the runner runs (an execution provider, a compiler's mode).
        clock: `wall` or `device`; see `Timed`.
        scenario: how the calls are made: `warm` (one after the other), `cold cache` (caches are emptied before each) or
            `paced` (each at its time, with idle time in between).
        pace: calls per second if they are paced.
        stopped: why the measurement ended: `settled` (all 95 % intervals are narrow enough), `time limit` or `samples`
            (the maximum number of samples).
        overhead_ms: what the timer measures for a call that does nothing; it is part of every sample.
        conditions: state of the machine meanwhile.
    """

    runner: str
    mode: str
    device: str
    precision: str
    batch_size: int
    clock: Clock
    scenario: Scenario
    pace: float | None
    stopped: Stopped
    overhead_ms: float
    conditions: Conditions
    teacher: SideTiming
    student: SideTiming
    comparison: Comparison


@dataclass(frozen=True)
class Samples:
    """Times of one side.

    Attributes:
        first_run_ms: time of the very first call with this batch, which compiles, plans or allocates.
        milliseconds: one per timed call, in order.
        launch_ms: host time until each call returned; empty if calls return when they are finished.
        cpu_ms: processor time of each call; empty on the device's clock.
    """

    first_run_ms: float
    milliseconds: tuple[float, ...]
    launch_ms: tuple[float, ...] = ()
    cpu_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Timed:
    """Times of both sides.

    Attributes:
        clock: `wall` (the host's clock around each call) or `device` (between two events on the device).
        order: T (teacher) or S (student) for each timed call; blocks of four, two calls per side.
        starts_ms: when the host made each call, relative to the first.
        teacher, student: equally many samples each.
        stopped: why it ended; see `Measurement`.
        overhead_ms: what the timer measures for a call that does nothing.
        conditions: state of the machine meanwhile.
    """

    clock: Clock
    order: str
    starts_ms: tuple[float, ...]
    teacher: Samples
    student: Samples
    stopped: Stopped
    overhead_ms: float
    conditions: Conditions


class RawSamples(Record):
    """The samples of one measurement, in `samples.json`; times are in milliseconds.

    Attributes:
        process: index of the fresh process that made them.
    """

    runner: str
    batch_size: int
    process: int = 0
    timed: Timed


class Failure(Record):
    """A runner or batch size that could not be measured.

    Attributes:
        batch_size: None if the runner could not be opened at all.
        message: why, and what to do.
    """

    runner: str
    batch_size: int | None
    message: str


class SectionTime(Record):
    """Time of one section in a call, or of everything outside the sections.

    Attributes:
        name: as in `Part`: the section's container, or `stem and head`.
        batch_size: images per call.
        teacher_ms, student_ms: medians, measured side by side in eager PyTorch.
    """

    name: str
    batch_size: int
    teacher_ms: float
    student_ms: float


class Finding(Record):
    """One sentence of the diagnosis.

    Attributes:
        kind: what it is about.
        sentence: for people, with its figures.
        figures: the figures of the sentence and those behind them, by name; the last word of a name is the unit, and a
            name without one is a ratio.
        runner, batch_size: the measurement that it concerns; None if it concerns several.
    """

    kind: Kind
    sentence: str
    figures: dict[str, float]
    runner: str | None = None
    batch_size: int | None = None


class Deviation(Record):
    """How far the student's output is from its teacher's at one place, over all elements of all images.

    Both are relative RMS errors (also: relative L2 errors), √(Σ(s − t)² / Σt²): 0 if equal, 1 if as far off as zeros.

    Attributes:
        name: a section; `stem` for the input of the first section; `logits` or `images` for the network's output.
        on_teacher: error of this part alone, on the teacher's input to it: S_i(T_{i−1}) against T_i. None if it is not
            finite, or if the teacher's output is zero throughout.
        on_own: error of the student's own chain up to here: S_i(S_{i−1}(…)) against T_i. None in the same cases.
    """

    name: str
    on_teacher: float | None
    on_own: float | None


class Fidelity(Record):
    """How closely the student's parts follow their teacher's, in float32, on images of the test split.

    Attributes:
        images: how many, evenly spaced over the split.
        deviations: in the order of the data: stem, sections, output.
        same_class_on_teacher: share of images for which the student's head, on the output of the teacher's last
            section, predicts the teacher's class, 0–1; None if the output has no classes.
        same_class_on_own: share of images for which the student itself does, 0–1; None in the same case.
    """

    images: int
    deviations: tuple[Deviation, ...]
    same_class_on_teacher: float | None
    same_class_on_own: float | None


class Report(Record):
    """The whole report.

    Attributes:
        verdict: the outcome in one sentence.
        bundle: the bundle's folder.
        student_sha256, onnx_sha256: hashes of the student's weights and of its ONNX file (None: there was none); a
            report whose hashes differ from the manifest's is out of date.
        lineage: a chain's networks, from the teacher here to the student that taught this one; else empty.
        depth_ratio, parameter_ratio, flop_ratio: teacher over student.
        measurements: by runner, then by batch size, in the target's order; at least one.
        failures: runners and batch sizes of the target that have no measurement.
        section_times: each section, then stem and head, in eager PyTorch.
        findings: the diagnosis: what bounds the speed, and what disturbed the measurement.
        fidelity: how closely the student's parts follow their teacher's; None if it could not be measured.
        fidelity_missing: why it could not be measured.
        parity: the comparison of the exported student with PyTorch; None if it was not exported.
        training: the rows of metrics.jsonl; numbers that are not finite are None.
        warnings: of the training.
        test_used_once: whether the scores on a test split are here; they are computed once, after the last epoch.
        recipe, target: with all their values.
        commands: the commands that repeat the report; `recipe.yaml` in them stands for `recipe`.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    verdict: str
    bundle: str
    student_sha256: str
    onnx_sha256: str | None
    teacher: Side
    student: Side
    lineage: tuple[Ancestor, ...] = ()
    depth_ratio: float
    parameter_ratio: float
    flop_ratio: float
    measurements: tuple[Measurement, ...]
    failures: tuple[Failure, ...]
    section_times: tuple[SectionTime, ...]
    findings: tuple[Finding, ...]
    fidelity: Fidelity | None = None
    fidelity_missing: str | None = None
    parity: Parity | None
    training: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...] = ()
    data: DataRecord
    test_used_once: bool
    environment: Environment
    recipe: Recipe
    target: Target
    commands: tuple[str, ...]

    @property
    def headline(self) -> Measurement:
        """The measurement that the verdict is about."""
        return headline(self.measurements)


def headline(measurements: Sequence[Measurement]) -> Measurement:
    """The measurement that matters most: the smallest batch in the runner of the exported file, which is what ships.

    If no exported file ran, it is the runner in which the student is fastest.
    """
    smallest = min(measurement.batch_size for measurement in measurements)
    at_smallest = [measurement for measurement in measurements if measurement.batch_size == smallest]
    shipped = [measurement for measurement in at_smallest if measurement.student.artefact]
    return min(shipped or at_smallest, key=lambda measurement: measurement.student.median_ms)


class PredictedStudent(Record):
    """A possible student.

    Attributes:
        name: display name: `ResNet-20`.
        depth: value for `--student-depth`.
        plan: the teacher's blocks that it keeps.
        breakdown: its depth, parameters, FLOPs.
        depth_ratio, parameter_ratio, flop_ratio: teacher over student.
        measurements: side by side with the teacher, as in a report.
        failures: runners and batch sizes that could not be measured.
    """

    name: str
    depth: int
    plan: DepthPlan
    breakdown: Breakdown
    depth_ratio: float
    parameter_ratio: float
    flop_ratio: float
    measurements: tuple[Measurement, ...]
    failures: tuple[Failure, ...]


class Prediction(Record):
    """Students of several depths, untrained, timed side by side with their teacher.

    Attributes:
        teacher: display name: `ResNet-56`.
        path: the teacher's file.
        noun: what a sample is.
        breakdown: the teacher's.
        students: shallowest first.
        target: with all its values.
    """

    schema_version: Literal[1] = 1
    teacher: str
    path: str
    noun: Noun = "image"
    breakdown: Breakdown
    students: tuple[PredictedStudent, ...]
    environment: Environment
    target: Target


def read_report(folder: Path) -> Report | None:
    """The report in a bundle's `profile/`; None if there is none that this version reads."""
    try:
        return Report.model_validate_json(read_small(folder / REPORT_NAME, MOST_RECORD_BYTES))
    except (OSError, ValidationError):
        return None


def open_report(path: Path) -> Report:
    """Read the report in a file or in a bundle.

    Raises:
        BundleError: there is none, or none that this version reads.
    """
    places = (path / REPORT_NAME, path / "profile" / REPORT_NAME)
    file = next((each for each in places if each.is_file()), places[0]) if path.is_dir() else path
    try:
        text = read_small(file, MOST_RECORD_BYTES)
        content = parse_json(text)
        if isinstance(content, dict) and content.get("schema_version") != SCHEMA_VERSION:
            raise BundleError(
                f"{file}: a report of schema version {content.get('schema_version')}, and this litdeploy reads "
                f"{SCHEMA_VERSION}. Profile its bundle again: litdeploy profile"
            )
        return Report.model_validate_json(text)
    except FileNotFoundError:
        raise BundleError(
            f"{path}: has no report. Give a report.json, or a bundle that was profiled: litdeploy profile {path}"
            if path.is_dir()
            else f"{path}: no such file. Give a report.json, or a bundle that was profiled."
        ) from None
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"{first['msg']} at {first['loc']}" if first else "no JSON"
        raise BundleError(f"{file}: not a report of litdeploy ({what}). Give a report.json, or a bundle.") from None


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema of report.json, with the meaning of each field."""
    schema = Report.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
