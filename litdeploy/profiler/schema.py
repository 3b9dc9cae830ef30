"""The report: what was measured, of what, where, and how to do it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import DepthPlan
from litdeploy.config.target import Target
from litdeploy.exporter import Parity
from litdeploy.profiler.analysis.breakdown import Breakdown
from litdeploy.profiler.analysis.diagnosis import Finding
from litdeploy.profiler.analysis.fidelity import Fidelity
from litdeploy.profiler.machine.conditions import Conditions
from litdeploy.profiler.machine.environment import Environment
from litdeploy.profiler.measure.scenarios import Scenario
from litdeploy.profiler.measure.section_times import SectionTime
from litdeploy.profiler.measure.statistics import Comparison, Summary
from litdeploy.profiler.measure.stopwatch import Clock
from litdeploy.profiler.measure.timing import Stopped, Timed
from litdeploy.storage.records import Accuracy, Ancestor, DataRecord, Likeness, Record

SCHEMA_VERSION: Literal[2] = 2


class Side(Record):
    """The teacher or the student.

    Attributes:
        name: for people: `ResNet-20`.
        network: as `--network` takes it; for a student, its teacher's.
        plan: the blocks that a student kept; None for a teacher.
        path, sha256, bytes: the file of weights.
        breakdown: depth, parameters, FLOPs.
        accuracy: split (`validation`, `test`) → accuracy as the bundle's manifest has it; empty where images are made.
        likeness: there, split → how near a student's images come to its teacher's.
    """

    name: str
    network: str
    plan: DepthPlan | None
    path: str
    sha256: str
    bytes: int
    breakdown: Breakdown
    accuracy: dict[str, Accuracy]
    likeness: dict[str, Likeness] = Field(default_factory=dict)


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
