"""What a comparison found: a table of methods and depths with intervals over seeds; as CSV, as a chart, as a page."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

import yaml
from markupsafe import Markup

from litdeploy.config.recipe import Recipe
from litdeploy.profiler.measure.statistics import mean_reach
from litdeploy.profiler.report.charts import FIRST, MUTED, SECOND, SERIES, panel, standalone_svg, svg
from litdeploy.profiler.report.page import fill
from litdeploy.profiler.report.tables import NOTHING, TextCell, TextTable, cells
from litdeploy.profiler.schema import Environment
from litdeploy.storage.records import DataRecord, Record, Score, TeacherRecord

_COLUMNS = (
    *("method", "depth", "seed", "test_top1", "test_images", "validation_top1"),
    *("seconds", "epochs", "images", "device"),
)
# LIT comes first, in the student's color. Markers tell methods apart without color.
_COLORS = (SECOND, *SERIES)
_MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<")


class Outcome(Record):
    """One cell of the grid, trained.

    Attributes:
        test: on the test split, which was used once, after the last epoch.
        seconds: wall-clock time of the training.
        epochs, images: passes, and training images in each.
        device: of the training; cells may come from several machines.
    """

    method: str
    depth: int
    seed: int
    validation: Score
    test: Score
    seconds: float
    epochs: int
    images: int
    device: str
    student_sha256: str


class MethodRow(Record):
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
    """The whole result.

    Attributes:
        teacher_accuracy: of the teacher on the test split; None until a cell is trained.
        rows: by depth, best method first.
        outcomes: the cells, by seed, depth and method.
        missing: commands of the requested cells that are not trained yet.
        failed: cell → why its training failed.
    """

    schema_version: Literal[1] = 1
    teacher: TeacherRecord
    teacher_name: str
    teacher_accuracy: Score | None
    data: DataRecord | None
    recipe: Recipe
    rows: tuple[MethodRow, ...]
    outcomes: tuple[Outcome, ...]
    missing: tuple[str, ...]
    failed: dict[str, str]
    environment: Environment

    @property
    def depths(self) -> list[int]:
        return sorted({row.depth for row in self.rows})


def rows_of(outcomes: Sequence[Outcome]) -> tuple[MethodRow, ...]:
    """One row for each depth and method, by depth, best method first."""
    members: dict[tuple[int, str], list[Outcome]] = {}
    for outcome in outcomes:
        members.setdefault((outcome.depth, outcome.method), []).append(outcome)
    rows = [_row(*key, found) for key, found in members.items()]
    return tuple(sorted(rows, key=lambda row: (row.depth, -row.mean)))


def _row(depth: int, method: str, outcomes: Sequence[Outcome]) -> MethodRow:
    accuracies = [_correct(outcome.test) for outcome in outcomes]
    middle = statistics.fmean(accuracies)
    half = mean_reach(accuracies) if len(accuracies) > 1 else None
    return MethodRow(
        method=method,
        depth=depth,
        seeds=tuple(outcome.seed for outcome in outcomes),
        mean=middle,
        low=None if half is None else max(0.0, middle - half),
        high=None if half is None else min(1.0, middle + half),
        seconds=statistics.fmean(outcome.seconds for outcome in outcomes),
    )


def headline(rows: Sequence[MethodRow]) -> str:
    """The best method at each depth and the next one, claiming no more than the seeds support."""
    sentences = []
    for depth in sorted({row.depth for row in rows}):
        best, *others = [row for row in rows if row.depth == depth]
        text = f"Depth {depth}: {best.method} {best.mean:.2%}"
        if others:
            text += f", next {others[0].method} {others[0].mean:.2%}"
            text += _doubt(best, others[0])
        sentences.append(text)
    return ". ".join(sentences).replace("%", "\N{NO-BREAK SPACE}%")


def _doubt(first: MethodRow, second: MethodRow) -> str:
    if first.low is None or second.high is None:
        return " (one seed)"
    return "" if first.low > second.high else " (intervals overlap)"


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """CSV with a line for each cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for each in outcomes:
        test, validation = _correct(each.test), _correct(each.validation)
        found = (test, each.test.images, validation, each.seconds, each.epochs, each.images)
        writer.writerow((each.method, each.depth, each.seed, *found, each.device))
    return text.getvalue()


class Drawing(NamedTuple):
    """One figure twice: as part of a page, whose colors it uses, and as a file of its own."""

    inline: Markup
    alone: str


def accuracy_over_depth(result: MethodComparison) -> Drawing | None:
    """Draw mean test accuracy over depth, and each seed's as a small circle; None until a cell is trained."""
    if not result.rows:
        return None
    methods = sorted({row.method for row in result.rows}, key=lambda name: (name != "lit", name))
    with panel(height=300, width=520) as (figure, axes):
        if result.teacher_accuracy is not None:
            axes.axhline(100 * _correct(result.teacher_accuracy), color=FIRST, lw=1.4, ls=(0, (4, 3)), label="teacher")
        for index, method in enumerate(methods):
            rows = [row for row in result.rows if row.method == method]
            each = [outcome for outcome in result.outcomes if outcome.method == method]
            color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
            depths, means = [row.depth for row in rows], [100 * row.mean for row in rows]
            axes.plot(depths, means, color=color, marker=marker, ms=6, lw=1.8, label=method)
            axes.scatter(
                [outcome.depth for outcome in each],
                [100 * _correct(outcome.test) for outcome in each],
                s=14,
                facecolors="none",
                edgecolors=color,
                linewidths=0.9,
            )
        axes.set_xticks(result.depths)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel("depth")
        axes.set_ylabel("test accuracy, %")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=MUTED)
        figure.subplots_adjust(left=0.1, right=0.75, top=0.96, bottom=0.16)
    inline = svg(figure, "accuracy-over-depth", "Test accuracy over depth", headline(result.rows))
    return Drawing(inline, standalone_svg(figure))


def render(result: MethodComparison, figure: Markup | None) -> str:
    """The comparison as one self-contained HTML page. Text from files (names, paths) is escaped.

    Args:
        figure: None if no student is trained yet.
    """
    return fill(
        "comparison.html.j2",
        "litdeploy.comparison",
        result=result,
        headline=headline(result.rows),
        figure=figure,
        accuracies=accuracies(result),
        trainings=_trainings(result),
        recipe=yaml.safe_dump(result.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
        devices=sorted({outcome.device for outcome in result.outcomes}),
    )


def accuracies(result: MethodComparison) -> TextTable:
    """Methods by depth, the best first."""
    groups = tuple(tuple(_cells(row) for row in result.rows if row.depth == depth) for depth in result.depths)
    heads = cells("depth", "method", "mean", "95 % interval", "seeds", "training, s")
    return TextTable("Test accuracy by depth, best method first", heads, groups, narrow=True)


def _cells(row: MethodRow) -> tuple[TextCell, ...]:
    interval = NOTHING
    if row.low is not None and row.high is not None:
        interval = f"{100 * row.low:.2f}–{100 * row.high:.2f}"
    return cells(
        str(row.depth),
        row.method,
        TextCell(_percent(row.mean), kind="strong"),
        interval,
        str(len(row.seeds)),
        f"{row.seconds:.0f}",
    )


def _trainings(result: MethodComparison) -> TextTable:
    rows = tuple(
        cells(
            each.method,
            str(each.depth),
            str(each.seed),
            _percent(_correct(each.test)),
            _percent(_correct(each.validation)),
            str(each.epochs),
            f"{each.seconds:.0f}",
        )
        for each in result.outcomes
    )
    heads = cells("method", "depth", "seed", "test", "validation", "epochs", "seconds")
    return TextTable("Each training", heads, (rows,), narrow=True)


def _correct(score: Score) -> float:
    """The accuracy, 0–1; `compare` takes only networks that have one."""
    assert score.correct is not None
    return score.correct


def _percent(share: float) -> str:
    return f"{100 * share:.2f}\N{NO-BREAK SPACE}%"
