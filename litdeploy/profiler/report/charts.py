"""The report's charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from litdeploy.profiler.figures import accuracy_interval, milliseconds, relative_error, runner_of, short
from litdeploy.profiler.report.drawing import FIRST, LETTER, MUTED, SECOND, TEXT, Bar, pairs, panel, svg

if TYPE_CHECKING:
    from litdeploy.profiler.schema import Fidelity, Measurement, Part, SectionTime, SideTiming
    from litdeploy.storage.records import Accuracy

_LINES = 230  # height of a chart of lines
_PLOT = 300  # width that is left to what is drawn, about
_TICK = 18  # letters of a name on an axis
_LEGEND_COLUMNS = 2
_MARKERS = "osD^vP"


def latency(batch_size: int, measurements: Sequence[Measurement]) -> Markup:
    """Bars of both sides' medians in each runner at one batch size, with their 95 % intervals."""
    rows = [(runner_of(each), latency_bar(each.teacher), latency_bar(each.student)) for each in measurements]
    return pairs(
        rows, f"latency-{batch_size}", f"Latency at batch size {batch_size}", "Medians of teacher and student."
    )


def side_by_side(batch_size: int, rows: Sequence[tuple[str, SideTiming | None, SideTiming | None]]) -> Markup:
    """Bars of a student's medians in two reports, with their 95 % intervals; a runner that one lacks has none there."""
    bars = [(runner, latency_bar(a) if a else None, latency_bar(b) if b else None) for runner, a, b in rows]
    title = f"Latency of the students at batch size {batch_size}"
    return pairs(bars, f"latency-{batch_size}", title, "Medians in A and B.", missing="not measured")


def latency_bar(side: SideTiming) -> Bar:
    """A median as a bar."""
    return Bar(side.median_ms, f"{milliseconds(side.median_ms)} ms", side.median_low_ms, side.median_high_ms)


def throughput(name: str, measurements: Sequence[Measurement]) -> Markup:
    """Images a second of both sides against the batch size, in one runner.

    Args:
        name: of the drawing on its page.
        measurements: of one runner, by batch size.
    """
    sizes = [each.batch_size for each in measurements]
    with panel(_LINES) as (figure, axes):
        for side, colour in (("teacher", FIRST), ("student", SECOND)):
            timings: list[SideTiming] = [getattr(each, side) for each in measurements]
            axes.plot(range(len(sizes)), [each.images_per_second for each in timings], color=colour, lw=1.8, marker="o")
            for x, (size, each) in enumerate(zip(sizes, timings, strict=True)):
                if each.median_low_ms and each.median_high_ms:
                    ends = (1e3 * size / each.median_high_ms, 1e3 * size / each.median_low_ms)
                    axes.plot((x, x), ends, color=TEXT, lw=1.4)
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.3, len(sizes) - 0.7)
        axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        axes.set_xlabel("batch size")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 5, 10)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 or not y else f"{y:g}"))
        _grid(axes)
        figure.subplots_adjust(left=0.17, right=0.985, top=0.96, bottom=0.23)
    told = "; ".join(
        f"batch {each.batch_size}: teacher {each.teacher.images_per_second:,.0f}, "
        f"student {each.student.images_per_second:,.0f}"
        for each in measurements
    )
    return svg(figure, name, f"Throughput of {runner_of(measurements[0])}", f"Images a second. {told}.")


def section_times(batch_size: int, times: Sequence[SectionTime]) -> Markup:
    """Bars of both sides' time in each section at one batch size."""

    def bar(ms: float) -> Bar:
        return Bar(ms, f"{milliseconds(ms)} ms")

    rows = [(each.name, bar(each.teacher_ms), bar(each.student_ms)) for each in times]
    title = f"Time by section at batch size {batch_size}"
    return pairs(rows, f"section-times-{batch_size}", title, "Medians of teacher and student.")


def section_sizes(quantity: str, title: str, parts: Sequence[tuple[Part, Part]]) -> Markup:
    """Bars of both sides' `parameters` or `flops` in each section."""

    def bar(part: Part) -> Bar:
        count = getattr(part, quantity)
        return Bar(count, short(count))

    rows = [(teacher.name, bar(teacher), bar(student)) for teacher, student in parts]
    return pairs(rows, f"section-{quantity}", title, "Teacher and student.")


def fidelity(found: Fidelity) -> Markup:
    """The error of each part by itself as bars, and along the student's own chain as a line, in percent."""
    names = [each.name if len(each.name) <= _TICK else f"…{each.name[1 - _TICK :]}" for each in found.deviations]
    alone, chain = (
        [float("nan") if value is None else 100 * value for value in values]
        for values in zip(*((each.on_teacher, each.on_own) for each in found.deviations), strict=True)
    )
    slanted = max(map(len, names)) * LETTER > _PLOT / len(names)
    # Slanted names reach down, and to the left of their bar.
    reach = max(map(len, names)) * LETTER * math.sqrt(0.5) if slanted else 0
    with panel(_LINES + 30 + reach) as (figure, axes):
        axes.bar(range(len(names)), alone, 0.5, color=FIRST)
        axes.plot(range(len(names)), chain, color=SECOND, lw=1.8, marker="o")
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xticks(range(len(names)), names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 5, 10)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
        _grid(axes)
        bottom = (34 + reach) / (_LINES + 30 + reach)
        figure.subplots_adjust(left=max(0.15, 0.72 * reach / _PLOT), right=0.985, top=0.96, bottom=bottom)
    told = "; ".join(
        f"{each.name}: {relative_error(each.on_teacher)} on the teacher's input, "
        f"{relative_error(each.on_own)} in the own chain"
        for each in found.deviations
    )
    return svg(figure, "fidelity", "Error of the student's parts", f"Relative RMS errors. {told}.")


def accuracy_latency(measurements: Sequence[Measurement], teacher: Accuracy, student: Accuracy) -> Markup:
    """Accuracy, with its 95 % interval, against latency on a logarithmic scale: a line a runner, teacher to student.

    Args:
        measurements: one a runner, at the same batch size.
        teacher, student: on the same images.
    """
    ordered = sorted(measurements, key=lambda each: each.student.median_ms)
    legend_rows = -(-len(ordered) // _LEGEND_COLUMNS)
    height = _LINES + 30 + 24 * legend_rows
    with panel(height) as (figure, axes):
        for each, marker in zip(ordered, cycle(_MARKERS)):
            xs = (each.teacher.median_ms, each.student.median_ms)
            axes.plot(xs, (100 * teacher.top1, 100 * student.top1), color=MUTED, lw=1, zorder=1)
            for x, found, colour in zip(xs, (teacher, student), (FIRST, SECOND), strict=True):
                axes.plot((x, x), [100 * end for end in accuracy_interval(found)], color=colour, lw=1.4, zorder=2)
                axes.plot(x, 100 * found.top1, color=colour, marker=marker, ms=8, zorder=3)
            axes.plot([], [], color=MUTED, marker=marker, ms=8, ls="", label=runner_of(each))
        _logarithmic(axes, [side.median_ms for each in ordered for side in (each.teacher, each.student)])
        axes.set_xlabel("ms a call")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 5, 10)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
        _grid(axes)
        bottom = (62 + 24 * legend_rows) / height
        figure.subplots_adjust(left=0.17, right=0.985, top=0.96, bottom=bottom)
        figure.legend(loc="lower center", ncols=_LEGEND_COLUMNS, frameon=False, labelcolor=MUTED, handletextpad=0.2)
    told = "; ".join(
        f"{runner_of(each)}: teacher {milliseconds(each.teacher.median_ms)} ms, "
        f"student {milliseconds(each.student.median_ms)} ms"
        for each in ordered
    )
    accuracies = f"Accuracy of the teacher {100 * teacher.top1:.2f} %, of the student {100 * student.top1:.2f} %."
    return svg(figure, "accuracy-latency", "Accuracy against latency", f"{accuracies} {told}.")


def prediction(
    name: str, runner: str, batch_size: int, points: Sequence[tuple[int, Measurement]], teacher_depth: int
) -> Markup:
    """Latency against depth in one runner, with 95 % intervals, and the teacher as a dashed line.

    Args:
        name: of the drawing on its page.
        points: (student's depth, its measurement beside the teacher).
    """
    # The teacher was measured beside each student: the shallowest's says as much as any other.
    teacher = latency_bar(points[0][1].teacher)
    students = [(depth, latency_bar(each.student)) for depth, each in points]
    with panel(_LINES) as (figure, axes):
        axes.axhline(teacher.value, color=FIRST, lw=1.4, ls=(0, (4, 3)))
        axes.plot(*zip(*((depth, bar.value) for depth, bar in students), strict=True), color=SECOND, lw=1.8, marker="o")
        axes.plot(teacher_depth, teacher.value, color=FIRST, marker="o")
        for depth, bar in [*students, (teacher_depth, teacher)]:
            if bar.low is not None and bar.high is not None:
                axes.plot((depth, depth), (bar.low, bar.high), color=TEXT, lw=1.4)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 5, 10)))
        axes.set_xlabel("depth")
        _grid(axes)
        figure.subplots_adjust(left=0.15, right=0.97, top=0.96, bottom=0.23)
    told = "; ".join(f"depth {depth}: {bar.text}" for depth, bar in students)
    title = f"Latency against depth in {runner} at batch size {batch_size}"
    return svg(figure, name, title, f"Teacher, depth {teacher_depth}: {teacher.text}. {told}.")


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with some figures on it, even where all values lie within one decade."""
    axes.set_xscale("log")
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.08, 1.05)
    axes.set_xlim(low / margin, high * margin)
    ratio = high / low
    subs = (1,) if ratio > 500 else (1, 2, 5) if ratio > 4 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _grid(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
