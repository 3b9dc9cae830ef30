"""Two compared reports as an HTML page, and as tables for page and terminal."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from litdeploy.profiler.analysis.diff import MeasurementDiff, Ratio, ReportDiff
from litdeploy.profiler.formatting import runner_of, times
from litdeploy.profiler.report import tables
from litdeploy.profiler.report.page import TitledChart, chart_module, fill
from litdeploy.profiler.report.tables import NOTHING, TextCell, TextTable, cells
from litdeploy.tasks import Task, task_of_scores

_A_B = (TextCell("A", kind="first"), TextCell("B", kind="second"))


def render_diff(diff: ReportDiff) -> str:
    """Render the page, self-contained like that of a report."""
    return fill(
        "diff.html.j2",
        diff=diff,
        measurements=measurements(diff),
        heading=_tasks(diff)[0].measure.capitalize(),
        scores=scores(diff),
        differing=differing(diff),
        drawn=chart_module() is not None,
        charts=_charts(diff),
    )


def measurements(diff: ReportDiff) -> TextTable:
    """The student's latency and its speed-up over the teacher, in both."""
    rows = tuple(
        cells(
            _runner(row),
            str(row.batch_size),
            *(tables.median(each.student) if each else NOTHING for each in (row.a, row.b)),
            _ratio(row.latency, {}),
            *(tables.speedup(each.comparison) if each else NOTHING for each in (row.a, row.b)),
            _ratio(row.speedup, {"faster": "more", "slower": "less"}),
        )
        for row in diff.rows
    )
    latencies = TextCell("A ms", kind="first"), TextCell("B ms", kind="second")
    speedups = TextCell("A speed-up", kind="first"), TextCell("B speed-up", kind="second")
    return TextTable(
        "Student’s latency in ms a call, and its speed-up over the teacher",
        cells("runner", "batch", *latencies, "B is", *speedups, "B gains"),
        (rows,),
        stacked=True,
    )


def scores(diff: ReportDiff) -> list[TextTable]:
    """The scores of all four networks on each split, a table for each task."""
    reports = diff.a, diff.b
    found = []
    for task in _tasks(diff):
        rows = []
        for role in ("teacher", "student"):
            sides = [getattr(report, role) for report in reports]
            names = " and ".join(dict.fromkeys(side.name for side in sides))
            for split in ("test", "validation"):
                both = [score if isinstance(score := side.scores.get(split), task.score) else None for side in sides]
                if any(both):
                    rows.append(cells(f"{role} ({names}), {split}", *map(task.figure, both)))
        if rows:
            found.append(TextTable(task.side_by_side, cells("", *_A_B), (tuple(rows),), narrow=True))
    return found


def differing(diff: ReportDiff) -> TextTable:
    """What differs between the reports."""
    rows = tuple(cells(each.what, *(TextCell(x, kind="breaks") for x in (each.a, each.b))) for each in diff.differing)
    return TextTable("Networks, data, environment, target and recipe", cells("", *_A_B), (rows,), narrow=True)


def _tasks(diff: ReportDiff) -> list[Task[Any]]:
    """The reports' tasks, each once."""
    return list(dict.fromkeys(task_of_scores(each.teacher.scores, each.student.scores) for each in (diff.a, diff.b)))


def _runner(row: MeasurementDiff) -> str:
    return next(runner_of(each) for each in (row.a, row.b) if each)


def _ratio(ratio: Ratio | None, words: dict[str, str]) -> TextCell:
    """A ratio with its interval and its verdict, in other words if `words` has them."""
    if ratio is None:
        return TextCell(NOTHING)
    interval = tables.span(ratio.low, ratio.high, lambda x: f"{x:.2f}")
    verdict = words.get(ratio.verdict, ratio.verdict)
    return TextCell(times(ratio.ratio), ", ".join(filter(None, (interval, verdict))), "strong")


def _charts(diff: ReportDiff) -> list[TitledChart]:
    """A chart of the student's latency for each batch size; none without matplotlib."""
    charts = chart_module()
    if charts is None:
        return []
    ordered = sorted(diff.rows, key=lambda row: row.batch_size)
    return [
        (
            f"Batch size {size}",
            charts.latency_diff(
                size, [(_runner(row), *(each and each.student for each in (row.a, row.b))) for row in members]
            ),
        )
        for size, members in groupby(ordered, key=lambda row: row.batch_size)
    ]
