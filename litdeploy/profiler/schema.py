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

_MUCH = 0.1  # of the time that threads could have run

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
        device_name: of the processor or GPU.
        cores: that this process may use.
        threads: that PyTorch computes with on the CPU.
        load_average: runnable processes in the last minute, just before; None where the system does not tell.
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
    """A GPU while something was measured on it.

    Attributes:
        clock_mhz, clock_low_mhz: of its multiprocessors, the median and the least.
        max_clock_mhz: that it can have.
        memory_clock_mhz: the median.
        temperature_c: the highest.
        power_watts: the median.
        throttle_reasons: why its clocks were held down; empty where they were not.
    """

    clock_mhz: float
    clock_low_mhz: float
    max_clock_mhz: float
    memory_clock_mhz: float
    temperature_c: float
    power_watts: float
    throttle_reasons: tuple[str, ...]


class Conditions(Record):
    """What else happened in the seconds of one measurement. None stands where the system does not tell.

    Attributes:
        seconds: that it took, without warm-up.
        cores: those that this process was on; more than its threads where it was not pinned.
        other_load: cores' worth of work that other processes did on these cores.
        machine_load: the same on all cores of the machine; they share memory and the last cache with these.
        stolen: share of these cores' time that the hypervisor gave to other machines.
        preemptions: times that another process took the core in the midst of work (involuntary context switches).
        cpu_seconds: of processor time that this process had, in all its threads.
        waiting_seconds: that this process's threads were ready to run and had no core.
        quota_seconds: that the process was stopped for, having used up its quota of processor time (cgroup).
        clock_mhz, clock_low_mhz: of these cores, the median and the least.
        gpu: of the GPU that it ran on; None on a CPU, and without NVML.
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
        """Whether its threads waited for a core in much of the time that they could have run; sleep does not count."""
        waited, worked = self.waiting_seconds or 0.0, self.cpu_seconds or 0.0
        return waited >= _MUCH * (waited + worked) > 0 and waited + worked >= (1 - _MUCH) * self.seconds


class Part(Record):
    """One section, or what is left outside of all sections.

    Attributes:
        name: of the section's container, or `stem and head`.
        blocks: how many blocks it has; None for the remainder.
        parameters: numbers that are trained.
        flops: floating-point operations for one image.
    """

    name: str
    blocks: int | None
    parameters: int
    flops: int


class Breakdown(Record):
    """Size of a network.

    Attributes:
        depth: weighted layers by the family's own count (`depth_unit` layers), elsewhere blocks in all sections.
        parameters: numbers that are trained.
        flops: floating-point operations for one image: two for each multiply-add of convolutions, matrix products and
            attention; everything elementwise (batch norm, activations, additions) is left out, as is usual.
        parts: the sections in the network's order, then the remainder; their sums are the totals.
    """

    depth: int
    depth_unit: Literal["layers", "blocks"]
    parameters: int
    flops: int
    parts: tuple[Part, ...]


class Side(ScoredRecord):
    """The teacher or the student.

    Attributes:
        name: for people: `ResNet-20`.
        network: as `--network` takes it; for a student, its teacher's.
        plan: the blocks that a student kept; None for a teacher.
        path, sha256, bytes: the file of weights.
        breakdown: depth, parameters, FLOPs.
        accuracy, likeness: from the bundle's manifest; see `ScoredRecord`.
    """

    name: str
    network: str
    plan: DepthPlan | None
    path: str
    sha256: str
    bytes: int
    breakdown: Breakdown


class Summary(Record):
    """Times of one side, in milliseconds a call.

    Attributes:
        samples: how many calls were timed.
        median_ms: of all samples.
        median_low_ms, median_high_ms: 95 % interval of the median; None from fewer than 6 samples. See
            `median_interval`.
        q1_ms, q3_ms: the quartiles; between them lies the middle half of the samples.
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
        launch_ms: host time until the call returned, the median; None where the call returns when it is done (on a
            CPU). About as long as `median_ms` or longer, the host is what the device waits for.
        cpu_ms: processor time of a call, of all threads, the median; None on the device's clock. Well below
            `median_ms` times the threads, calls wait: for the core, where other work has it, or for one another.
        copy_in_ms, copy_out_ms: to copy a batch to the device and its logits back, the medians; None where nothing is
            copied.
        end_to_end_ms: host time from a batch in host memory to logits in host memory, the median; None likewise.
        captured_ms: device time of the same call replayed as a CUDA graph, the median; None on a CPU, and where it
            cannot be captured. Never the headline.
        load_seconds: to open the runner (read the file, place the module); the same for all batch sizes.
        build_seconds: to make the exported file that was opened, where this profile made it; None elsewhere. What the
            runner `compiled` compiles is in `first_run_ms`.
        first_run_ms: the first call with this batch size, in milliseconds, apart from all others.
        peak_memory_bytes: most memory that this side added, loading and first run with this batch size and those
            before it: of the process's resident memory on a CPU, of the device's memory on CUDA; None where the system
            does not tell.
        energy_joules: of the whole GPU for one call; None without NVML.
        artefact: the exported file that ran; None where the runner took the module.
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
    """Teacher against student.

    Attributes:
        speedup: median of the teacher over median of the student; above 1 the student is faster. The headline. Of
            several processes, their geometric mean.
        speedup_low, speedup_high: its 95 % interval, by bootstrap over blocks of calls that were made side by side; of
            several processes it holds the spread between them too. None from fewer than 4 blocks.
        paired_speedup: the same ratio within each block, the median over the blocks. Where it is far from `speedup`,
            the machine did not hold still.
        cpu_speedup: the ratio of the medians of processor time; None on the device's clock.
        verdict: `faster` or `slower` where all of the interval is 2 % or more from 1; `same` where all of it is within
            5 % of 1; else `unclear`. So is a speed-up that is far from that in processor time, where calls waited for a
            core that other work had: long ones lose it more often than short ones.
        reason: why it is `unclear`; None elsewhere.
        processes: the speed-up in each fresh process; empty where there was one process.
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
        runner: `eager`, `compiled`, `onnxruntime`.
        mode: what the runner says of how it runs (a provider, a compiler's mode).
        clock: `wall` or `device`; see `timing.Timed`.
        scenario: how the calls were made: `warm` (one after the other), `cold cache` (the caches are emptied before
            each) or `paced` (each at its time, with idle time between).
        pace: calls a second, where paced.
        stopped: why it ended: `settled` (all 95 % intervals are as narrow as was asked for), `time limit` or
            `samples` (as many as were asked for).
        overhead_ms: what the timer measures of a call that does nothing; it is in every sample.
        conditions: of the machine meanwhile.
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
    """One side's times.

    Attributes:
        first_run_ms: the very first call with this batch, in milliseconds; compiles, plans or allocates.
        milliseconds: one a timed call, in the order in which they were made.
        launch_ms: host time until each of them returned; empty where they return when they are done.
        cpu_ms: processor time of each of them; empty on the device's clock.
    """

    first_run_ms: float
    milliseconds: tuple[float, ...]
    launch_ms: tuple[float, ...] = ()
    cpu_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Timed:
    """Both sides' times.

    Attributes:
        clock: `wall` (the host's clock round each call) or `device` (between two events on the device).
        order: T (teacher) or S (student) for each timed call; blocks of four, two calls a side.
        starts_ms: when the host made each of them, from the first one on.
        teacher, student: as many samples each.
        stopped: why it ended; see `report.Measurement`.
        overhead_ms: what the timer measures of a call that does nothing.
        conditions: of the machine meanwhile.
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
    """The samples behind one measurement, in `samples.json`; times are in milliseconds.

    Attributes:
        process: which of several fresh processes made them.
    """

    runner: str
    batch_size: int
    process: int = 0
    timed: Timed


class Failure(Record):
    """What could not be measured.

    Attributes:
        batch_size: None where the runner could not be opened at all.
        message: why, and how to mend it.
    """

    runner: str
    batch_size: int | None
    message: str


class SectionTime(Record):
    """The time of one section in a call, or of all that is outside of the sections.

    Attributes:
        name: as of `breakdown.Part`: the section's container, or `stem and head`.
        batch_size: images a call.
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
        figures: those of the sentence and what they were computed from, by name; the unit is the name's last word,
            and what has none is a ratio.
        runner, batch_size: what it was found of; None where it is of several.
    """

    kind: Kind
    sentence: str
    figures: dict[str, float]
    runner: str | None = None
    batch_size: int | None = None


class Deviation(Record):
    """How far the student's output is from its teacher's at one place, over all elements of all images.

    Both are relative RMS errors (also: relative L2 errors), √(Σ(s − t)² / Σt²): 0 is equal, 1 as far off as zeros are.

    Attributes:
        name: a section; `stem` for what enters the first section; `logits`, or `images` where such are made, for the
            network's output.
        on_teacher: of this part alone, on the teacher's input to it: S_i(T_{i−1}) against T_i. None where it is not
            finite, or where the teacher's output is zero throughout.
        on_own: of the student's own chain up to here: S_i(S_{i−1}(…)) against T_i. None likewise.
    """

    name: str
    on_teacher: float | None
    on_own: float | None


class Fidelity(Record):
    """How closely the student's parts follow their teacher's, in float32, on images of the test split.

    Attributes:
        images: how many, evenly spaced over the split.
        deviations: in the data's way: the stem, the sections, the logits.
        same_class_on_teacher: share of images on which the student's head, given the teacher's last section, names the
            teacher's class, 0–1; None where images are made.
        same_class_on_own: share of images on which the student names the teacher's class, 0–1; None likewise.
    """

    images: int
    deviations: tuple[Deviation, ...]
    same_class_on_teacher: float | None
    same_class_on_own: float | None


class Report(Record):
    """All of it.

    Attributes:
        verdict: the outcome in one sentence.
        bundle: the folder.
        student_sha256, onnx_sha256: of the student's weights and its exported file (None: there was none); a report
            whose hashes are not the manifest's is out of date.
        lineage: of a chain's student, from the teacher here to the student that taught it; else nothing.
        depth_ratio, parameter_ratio, flop_ratio: teacher over student.
        measurements: by runner, then by batch size, as the target lists them; at least one.
        failures: runners and batch sizes of the target that are not among them.
        section_times: each section, then stem and head, in eager PyTorch.
        findings: the diagnosis: what the speed is bound by, and what disturbed the measurement.
        fidelity: how closely the student's parts follow their teacher's; None where it could not be measured.
        fidelity_missing: why not.
        parity: how the exported student was held against PyTorch; None where it was not exported.
        training: the rows of metrics.jsonl; numbers that are not finite are None.
        test_used_once: whether both networks' accuracy on a test split is here, or the likeness of the student's
            images; it is computed after the last epoch.
        recipe, target: with all their values.
        commands: that repeat the report; `recipe.yaml` in them is `recipe`.
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
    data: DataRecord
    test_used_once: bool
    environment: Environment
    recipe: Recipe
    target: Target
    commands: tuple[str, ...]

    @property
    def headline(self) -> Measurement:
        """The measurement that the verdict speaks of."""
        return headline(self.measurements)


def headline(measurements: Sequence[Measurement]) -> Measurement:
    """The measurement that matters most: the smallest batch in the runner of the exported file, which is what ships.

    Where no exported file ran, the runner in which the student answers fastest.
    """
    smallest = min(measurement.batch_size for measurement in measurements)
    at_smallest = [measurement for measurement in measurements if measurement.batch_size == smallest]
    shipped = [measurement for measurement in at_smallest if measurement.student.artefact]
    return min(shipped or at_smallest, key=lambda measurement: measurement.student.median_ms)


class PredictedStudent(Record):
    """One student that could be.

    Attributes:
        name: for people: `ResNet-20`.
        depth: as `--student-depth` takes it.
        plan: the teacher's blocks that it would keep.
        breakdown: its depth, parameters, FLOPs.
        depth_ratio, parameter_ratio, flop_ratio: teacher over student.
        measurements: beside the teacher, as in a report; `teacher` in them is the teacher.
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
    """Students of several depths, not trained, timed beside their teacher.

    Attributes:
        teacher: for people: `ResNet-56`.
        path: the teacher's file.
        noun: what it takes.
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
    """The report in a bundle's `profile/`; None where there is none that this version reads."""
    try:
        return Report.model_validate_json(read_small(folder / REPORT_NAME, MOST_RECORD_BYTES))
    except (OSError, ValidationError):
        return None


def open_report(path: Path) -> Report:
    """The report in a file, or in a bundle.

    Raises:
        BundleError: there is none, or none that this version reads; it says what to type.
    """
    file = path
    if path.is_dir():
        file = next(
            (at / REPORT_NAME for at in (path, path / "profile") if (at / REPORT_NAME).is_file()), path / REPORT_NAME
        )
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
            f"{path}: holds no report. Give a report.json, or a bundle that was profiled: litdeploy profile {path}"
            if path.is_dir()
            else f"{path}: no such file. Give a report.json, or a bundle that was profiled."
        ) from None
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}).") from None
    except (ValueError, ValidationError) as error:
        what = (
            f"{error.errors()[0]['msg']} at {error.errors()[0]['loc']}"
            if isinstance(error, ValidationError)
            else "no JSON"
        )
        raise BundleError(f"{file}: not a report of litdeploy ({what}). Give a report.json, or a bundle.") from None


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema of report.json, with the meaning of each field."""
    schema = Report.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
