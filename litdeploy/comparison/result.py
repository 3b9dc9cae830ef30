"""What a comparison found: a table of methods and depths, with intervals over seeds."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from typing import Literal

from litdeploy.config.recipe import Recipe
from litdeploy.profiler.measure.statistics import mean_reach
from litdeploy.profiler.schema import Environment
from litdeploy.storage.records import Accuracy, DataRecord, Record, TeacherRecord

_COLUMNS = (
    *("method", "depth", "seed", "test_top1", "test_images", "validation_top1"),
    *("seconds", "epochs", "images", "device"),
)


class Outcome(Record):
    """One cell that was trained.

    Attributes:
        test: on the test split, which was used once, after the last epoch.
        seconds: wall-clock time of the training.
        epochs, images: passes over so many training images.
        device: that it was trained on; cells may come from several machines.
    """

    method: str
    depth: int
    seed: int
    validation: Accuracy
    test: Accuracy
    seconds: float
    epochs: int
    images: int
    device: str
    student_sha256: str


class Row(Record):
    """A method at a depth, over its seeds.

    Attributes:
        mean: of the test accuracies, 0–1.
        low, high: 95 % interval of the mean by Student's t, within 0–1; None from a single seed.
        seconds: mean wall-clock time of a training.
    """

    method: str
    depth: int
    seeds: tuple[int, ...]
    mean: float
    low: float | None
    high: float | None
    seconds: float


class MethodComparison(Record):
    """All of it.

    Attributes:
        teacher_accuracy: of the teacher on the test split; None while no cell is there.
        rows: by depth, best method first.
        outcomes: the cells, by seed, depth and method.
        missing: commands of the cells that were asked for and are not there.
        failed: cell → why its training could not go on.
    """

    schema_version: Literal[1] = 1
    teacher: TeacherRecord
    teacher_name: str
    teacher_accuracy: Accuracy | None
    data: DataRecord | None
    recipe: Recipe
    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]
    missing: tuple[str, ...]
    failed: dict[str, str]
    environment: Environment

    @property
    def depths(self) -> list[int]:
        return sorted({row.depth for row in self.rows})


def rows_of(outcomes: Sequence[Outcome]) -> tuple[Row, ...]:
    """One row a depth and method, by depth, best method first."""
    members: dict[tuple[int, str], list[Outcome]] = {}
    for outcome in outcomes:
        members.setdefault((outcome.depth, outcome.method), []).append(outcome)
    rows = [_row(*key, found) for key, found in members.items()]
    return tuple(sorted(rows, key=lambda row: (row.depth, -row.mean)))


def _row(depth: int, method: str, outcomes: Sequence[Outcome]) -> Row:
    accuracies = [outcome.test.top1 for outcome in outcomes]
    middle = statistics.fmean(accuracies)
    half = mean_reach(accuracies) if len(accuracies) > 1 else None
    return Row(
        method=method,
        depth=depth,
        seeds=tuple(outcome.seed for outcome in outcomes),
        mean=middle,
        low=None if half is None else max(0.0, middle - half),
        high=None if half is None else min(1.0, middle + half),
        seconds=statistics.fmean(outcome.seconds for outcome in outcomes),
    )


def headline(rows: Sequence[Row]) -> str:
    """The best method at each depth, and what the next one has; no more than the seeds bear out."""
    sentences = []
    for depth in sorted({row.depth for row in rows}):
        best, *others = [row for row in rows if row.depth == depth]
        text = f"Depth {depth}: {best.method} {best.mean:.2%}"
        if others:
            text += f", next {others[0].method} {others[0].mean:.2%}"
            text += _doubt(best, others[0])
        sentences.append(text)
    return ". ".join(sentences).replace("%", "\N{NO-BREAK SPACE}%")


def _doubt(first: Row, second: Row) -> str:
    if first.low is None or second.high is None:
        return " (one seed)"
    return "" if first.low > second.high else " (intervals overlap)"


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """One line a cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for each in outcomes:
        found = (each.test.top1, each.test.images, each.validation.top1, each.seconds, each.epochs, each.images)
        writer.writerow((each.method, each.depth, each.seed, *found, each.device))
    return text.getvalue()
