"""The report: what was measured, of what, where, and how to do it again. One JSON file, and a page for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from litdeploy.bundle import Accuracy, DataRecord, Fidelity, Record, write_whole
from litdeploy.exporter import Parity
from litdeploy.profiler.breakdown import Breakdown
from litdeploy.profiler.environment import Environment
from litdeploy.profiler.page import render
from litdeploy.profiler.statistics import Comparison, Summary
from litdeploy.profiler.timing import Clock, Timed
from litdeploy.recipe import Recipe
from litdeploy.spec import DepthPlan
from litdeploy.target import Target

_REPORT = "report.json"


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
    likeness: dict[str, Fidelity] = Field(default_factory=dict)


class SideTiming(Summary):
    """Times of one side in one runner.

    Attributes:
        first_run_ms: the first call with this batch size, in milliseconds, apart from all others.
        build_seconds: to open the runner; the same for all batch sizes.
        artefact: the exported file that ran; None where the runner took the module.
    """

    first_run_ms: float
    build_seconds: float
    artefact: str | None


class Measurement(Record):
    """Teacher and student in one runner with one batch size.

    Attributes:
        runner: `eager`, `compiled`, `onnxruntime`.
        mode: what the runner says of how it runs (a provider, a compiler's mode).
        clock: `wall` or `device`; see `timing.Timed`.
    """

    runner: str
    mode: str
    device: str
    precision: str
    batch_size: int
    clock: Clock
    teacher: SideTiming
    student: SideTiming
    comparison: Comparison


class RawSamples(Record):
    """The samples behind one measurement, in `samples.json`; times are in milliseconds."""

    runner: str
    batch_size: int
    timed: Timed


class Report(Record):
    """All of it.

    Attributes:
        verdict: the outcome in one sentence.
        bundle: the folder.
        student_sha256, onnx_sha256: of the student's weights and its exported file (None: there was none); a report
            whose hashes are not the manifest's is out of date.
        depth_ratio, parameter_ratio, flop_ratio: teacher over student.
        measurements: by runner, then by batch size, as the target lists them.
        parity: how the exported student was held against PyTorch; None where it was not exported.
        training: the rows of metrics.jsonl; numbers that are not finite are None.
        test_used_once: whether both networks' accuracy on a test split is here; it is computed after the last epoch.
        recipe, target: with all their values.
        commands: that repeat the report; `recipe.yaml` in them is `recipe`.
    """

    schema_version: Literal[1] = 1
    verdict: str
    bundle: str
    student_sha256: str
    onnx_sha256: str | None
    teacher: Side
    student: Side
    depth_ratio: float
    parameter_ratio: float
    flop_ratio: float
    measurements: tuple[Measurement, ...]
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


def read_training(path: Path) -> tuple[dict[str, Any], ...]:
    """Rows of a metrics.jsonl; none where there is no such file, and without a line that was torn."""
    if not path.is_file():
        return ()
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append({key: None if _not_finite(value) else value for key, value in row.items()})
    return tuple(rows)


def read_report(folder: Path) -> Report | None:
    """The report in a bundle's `profile/`; None where there is none that this version reads."""
    try:
        return Report.model_validate_json((folder / _REPORT).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def write(report: Report, samples: Sequence[RawSamples], folder: Path) -> None:
    """Writes samples.json, report.html and, last, report.json, each whole or not at all."""
    texts = {
        "samples.json": json.dumps(
            {"schema_version": 1, "measurements": [raw.model_dump(mode="json") for raw in samples]}
        ),
        "report.html": render(report),
        _REPORT: report.model_dump_json(indent=2),
    }
    for name, text in texts.items():
        with write_whole(folder / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
