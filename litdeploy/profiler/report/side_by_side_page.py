"""Two reports side by side as a page, and as tables for page and terminal."""

from __future__ import annotations

from itertools import groupby

from litdeploy.profiler.analysis.side_by_side import Ratio, Row, SideBySide
from litdeploy.profiler.figures import percent, runner_of, times
from litdeploy.profiler.report import tables
from litdeploy.profiler.report.page import Drawn, chart_module, fill
from litdeploy.profiler.report.tables import NOTHING, Cell, Table, columns


def render_side_by_side(found: SideBySide) -> str:
    """The page as HTML, on its own as that of a report is."""
    return fill(
        "side_by_side.html.j2",
        found=found,
        tables={
            "measurements": measurements(found),
            "accuracies": accuracies(found),
            "likenesses": likenesses(found),
            "differing": differing(found),
        },
        drawn=chart_module() is not None,
        latency=_drawings(found),
    )


def measurements(found: SideBySide) -> Table:
    """The student's latency and its speed-up over the teacher, in both."""
    rows = tuple(
        (
            Cell(_runner(row)),
            Cell(str(row.batch_size)),
            *(tables.median(each.student) if each else Cell(NOTHING) for each in (row.a, row.b)),
            _ratio(row.latency, {}),
            *(tables.speedup(each.comparison) if each else Cell(NOTHING) for each in (row.a, row.b)),
            _ratio(row.speedup, {"faster": "more", "slower": "less"}),
        )
        for row in found.rows
    )
    return Table(
        "Student’s latency in ms a call, and its speed-up over the teacher",
        columns(
            "runner",
            "batch",
            Cell("A ms", kind="first"),
            Cell("B ms", kind="second"),
            "B is",
            Cell("A speed-up", kind="first"),
            Cell("B speed-up", kind="second"),
            "B gains",
        ),
        (rows,),
        stacked=True,
    )


def accuracies(found: SideBySide) -> Table:
    """Accuracy of all four networks on each split that any of them has."""
    sides = [(role, split) for role in ("teacher", "student") for split in ("test", "validation")]
    rows = []
    for role, split in sides:
        both = [getattr(report, role).accuracy.get(split) for report in (found.a, found.b)]
        if any(both):
            names = list(dict.fromkeys(getattr(report, role).name for report in (found.a, found.b)))
            rows.append((Cell(f"{role} ({' and '.join(names)}), {split}"), *(Cell(percent(each)) for each in both)))
    return Table(
        "Top-1 accuracy of each network",
        columns("", Cell("A", kind="first"), Cell("B", kind="second")),
        (tuple(rows),),
        narrow=True,
    )


def likenesses(found: SideBySide) -> Table:
    """How near each student's images come to its teacher's, where images are made."""
    rows = []
    for split in ("test", "validation"):
        both = [report.student.likeness.get(split) for report in (found.a, found.b)]
        if any(both):
            rows.append((Cell(split), *(Cell(each.summary() if each else NOTHING) for each in both)))
    return Table(
        "Likeness of each student’s images to its teacher’s",
        columns("", Cell("A", kind="first"), Cell("B", kind="second")),
        (tuple(rows),),
        narrow=True,
    )


def differing(found: SideBySide) -> Table:
    """What is not the same in both."""
    rows = tuple(
        (Cell(each.what), Cell(each.a, kind="breaks"), Cell(each.b, kind="breaks")) for each in found.differing
    )
    return Table(
        "Of networks, data, environment, target and recipe",
        columns("", Cell("A", kind="first"), Cell("B", kind="second")),
        (rows,),
        narrow=True,
    )


def _runner(row: Row) -> str:
    return next(runner_of(each) for each in (row.a, row.b) if each)


def _ratio(ratio: Ratio | None, words: dict[str, str]) -> Cell:
    """A ratio with its interval and its verdict, in these words where there are others."""
    if ratio is None:
        return Cell(NOTHING)
    interval = tables.span(ratio.low, ratio.high, lambda x: f"{x:.2f}")
    return Cell(
        times(ratio.ratio), ", ".join(filter(None, (interval, words.get(ratio.verdict, ratio.verdict)))), "strong"
    )


def _drawings(found: SideBySide) -> list[Drawn]:
    """A chart of the student's latency for each batch size; none without matplotlib."""
    charts = chart_module()
    if charts is None:
        return []
    ordered = sorted(found.rows, key=lambda row: row.batch_size)
    return [
        (
            f"Batch size {size}",
            charts.side_by_side(
                size,
                [(_runner(row), *(each and each.student for each in (row.a, row.b))) for row in members],
            ),
        )
        for size, members in groupby(ordered, key=lambda row: row.batch_size)
    ]
