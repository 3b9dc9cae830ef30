"""Charts as SVG that takes its colors and fonts from the page around it.

First how every chart is drawn (`panel`, `svg`), then the charts of the reports.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import cycle, groupby
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from litdeploy.profiler.formatting import LARGEST, milliseconds, relative_error, runner_of, short
from litdeploy.profiler.schema import Fidelity, Measurement, Part, SectionTime, SideTiming
from litdeploy.tasks import Curve

# Placeholders for the page's own colors: an SVG is drawn once and must follow the page from light to dark.
TEXT, MUTED, RULE, FIRST, SECOND = (f"#0a0b0{number}" for number in range(1, 6))
SERIES = tuple(f"#0c0d0{number}" for number in range(1, 8))  # of further lines
_VARIABLES = {
    TEXT: "text",
    MUTED: "muted",
    RULE: "rule",
    FIRST: "first",
    SECOND: "second",
    **{color: f"series-{number}" for number, color in enumerate(SERIES, start=1)},
}

# A panel is drawn as wide as a phone's page, where it fills the line; on wider pages several stand in a row. Its units
# are 1/72 inch, which the page shows as one CSS pixel.
_WIDTH = 5.0
_UNIT = 1 / 72
_FONT_SIZE = 14.0
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "litdeploy",
    "font.size": _FONT_SIZE,
    "text.color": TEXT,
    "text.parse_math": False,
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.color": RULE,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0.0,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
}
_ROW_UNITS = 74  # height of one pair of bars with its name
_BAR = 0.26  # of a row
_LETTER = 0.62 * _FONT_SIZE  # approximate width of one
_LINES = 230  # height of a line chart
_PLOT = 300  # approximate width of the area that is drawn in
_TICK = 18  # letters of a name on an axis
_LEGEND_COLUMNS = 2
_MARKERS = "osD^vP"
_CURVE: dict[str, Any] = {"lw": 1.8, "marker": "o"}
_REFERENCE: dict[str, Any] = {"lw": 1.4, "ls": (0, (4, 3))}


@contextmanager
def panel(height: float, width: float = _WIDTH / _UNIT) -> Iterator[tuple[Figure, Axes]]:
    """A figure of this size, in CSS pixels of a phone's page, with axes in the page's style."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width * _UNIT, height * _UNIT), facecolor="none")
        yield figure, figure.add_subplot()


def svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Render the figure as an inline element with a name for screen readers.

    Args:
        name: of the drawing, unique on its page: letters, digits and hyphens.
        title, description: plain text, which is escaped here.
    """
    drawing = _drawn(figure)
    # Several drawings share the page, so each needs ids of its own; in HTML, `href` has no namespace.
    drawing = re.sub(r'\bid="', f'id="{name}-', drawing)
    drawing = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", drawing).replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        drawing = drawing.replace(color, f"var(--{variable})")
    width, height = figure.get_size_inches() * 72
    opening = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-description">{escape(description)}</desc>'
    )
    # matplotlib escapes the text that it draws, and the rest is ours.
    return Markup(re.sub(r"^<svg[^>]*>", lambda _: opening, drawing).strip())  # noqa: S704


def standalone_svg(figure: Figure) -> str:
    """Render the figure as a file of its own: in the page's light colors, on white."""
    style = resources.files("litdeploy.profiler.report").joinpath("templates", "page.css").read_text(encoding="utf-8")
    # The first block of the page's style has the light colors.
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", style.partition("}")[0]))
    figure.set_facecolor("#ffffff")
    drawing = _drawn(figure)
    for color, variable in _VARIABLES.items():
        drawing = drawing.replace(color, colors[variable])
    return drawing


def _drawn(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Names in other scripts: the page's fonts have the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
    return re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)


@dataclass(frozen=True)
class Value:
    """A value in a chart, its label, and the ends of its interval if it has one."""

    value: float
    text: str
    low: float | None = None
    high: float | None = None

    @property
    def end(self) -> float:
        """The larger of the value and its interval's upper end."""
        return self.value if self.high is None else max(self.value, self.high)


def median(side: SideTiming) -> Value:
    """A median with its 95 % interval."""
    return Value(side.median_ms, f"{milliseconds(side.median_ms)} ms", side.median_low_ms, side.median_high_ms)


def bar_pairs(
    rows: Sequence[tuple[str, Value | None, Value | None]], name: str, title: str, description: str, missing: str = "–"
) -> Markup:
    """Draw a pair of bars per row, the first above the second, each with its interval and its label.

    Args:
        rows: name and both values; None: shown as `missing`.
        description: read by a screen reader before the figures, which are added.
    """
    rows = [(label, _drawable(first), _drawable(second)) for label, first, second in rows]
    with panel(height=len(rows) * _ROW_UNITS + 12) as (figure, axes):
        axes.axis("off")
        for row, (label, *bars) in enumerate(rows):
            axes.text(0, row - 0.36, label, va="center", color=MUTED)
            for offset, bar, color in zip((-0.08, 0.22), bars, (FIRST, SECOND), strict=True):
                _draw_bar(axes, row + offset, bar, color, missing)
        shown = [bar for _, *bars in rows for bar in bars if bar]
        # Room for the bar that reaches furthest with its label, which does not shrink with the scale.
        ends = (bar.end / (1 - (_LETTER * len(bar.text) + 10) * _UNIT / _WIDTH) for bar in shown)
        axes.set_xlim(0, max(ends, default=0) or 1)
        axes.set_ylim(len(rows) - 0.45, -0.6)
        figure.subplots_adjust(left=0.003, right=1, top=1, bottom=0)
    figures = "; ".join(
        f"{label}: {first.text if first else missing}, {second.text if second else missing}"
        for label, first, second in rows
    )
    return svg(figure, name, title, f"{description} {figures}.")


def _drawable(bar: Value | None) -> Value | None:
    """The value, or None if an axis cannot show it: a file may hold any number."""
    if bar is None or not all(abs(x) < LARGEST for x in (bar.value, bar.low or 0.0, bar.high or 0.0)):
        return None
    return bar


def _draw_bar(axes: Axes, y: float, bar: Value | None, color: str, missing: str) -> None:
    if bar is None:
        axes.annotate(missing, (0, y), (2, 0), textcoords="offset points", va="center_baseline", color=MUTED)
        return
    axes.barh(y, bar.value, _BAR, color=color)
    if bar.low is not None and bar.high is not None:
        axes.plot((bar.low, bar.high), (y, y), color=TEXT, lw=1.4, solid_capstyle="butt")
        for x in (bar.low, bar.high):
            axes.plot((x, x), (y - _BAR / 3, y + _BAR / 3), color=TEXT, lw=1.4, solid_capstyle="butt")
    axes.annotate(bar.text, (bar.end, y), (6, 0), textcoords="offset points", va="center_baseline")


def latency(batch_size: int, measurements: Sequence[Measurement]) -> Markup:
    """Bars of both sides' medians in each runner at one batch size, with their 95 % intervals."""
    rows = [(runner_of(each), median(each.teacher), median(each.student)) for each in measurements]
    title = f"Latency at batch size {batch_size}"
    return bar_pairs(rows, f"latency-{batch_size}", title, "Medians of teacher and student.")


def latency_diff(batch_size: int, rows: Sequence[tuple[str, SideTiming | None, SideTiming | None]]) -> Markup:
    """Bars of a student's medians in two reports, with their 95 % intervals, by runner."""
    bars = [(runner, median(a) if a else None, median(b) if b else None) for runner, a, b in rows]
    title = f"Latency of the students at batch size {batch_size}"
    return bar_pairs(bars, f"latency-{batch_size}", title, "Medians in A and B.", missing="not measured")


def section_times(batch_size: int, times: Sequence[SectionTime]) -> Markup:
    """Bars of both sides' time in each section at one batch size."""

    def bar(ms: float) -> Value:
        return Value(ms, f"{milliseconds(ms)} ms")

    rows = [(each.name, bar(each.teacher_ms), bar(each.student_ms)) for each in times]
    title = f"Time by section at batch size {batch_size}"
    return bar_pairs(rows, f"section-times-{batch_size}", title, "Medians of teacher and student.")


def section_sizes(quantity: str, title: str, parts: Sequence[tuple[Part, Part]]) -> Markup:
    """Bars of both sides' `parameters` or `flops` in each section."""

    def bar(part: Part) -> Value:
        count = getattr(part, quantity)
        return Value(count, short(count))

    rows = [(teacher.name, bar(teacher), bar(student)) for teacher, student in parts]
    return bar_pairs(rows, f"section-{quantity}", title, "Teacher and student.")


def throughput(name: str, noun: str, measurements: Sequence[Measurement]) -> Markup:
    """Samples a second of both sides against the batch size, in one runner.

    Args:
        name: of the drawing, unique on its page.
        noun: of a sample: `image`.
        measurements: of one runner, by batch size.
    """
    sizes = [each.batch_size for each in measurements]
    with panel(_LINES) as (figure, axes):
        for side, color in (("teacher", FIRST), ("student", SECOND)):
            timings: list[SideTiming] = [getattr(each, side) for each in measurements]
            axes.plot(range(len(sizes)), [each.images_per_second for each in timings], color=color, **_CURVE)
            for x, (size, each) in enumerate(zip(sizes, timings, strict=True)):
                if each.median_low_ms and each.median_high_ms:
                    _draw_interval(axes, x, 1e3 * size / each.median_high_ms, 1e3 * size / each.median_low_ms)
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.3, len(sizes) - 0.7)
        axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        axes.set_xlabel("batch size")
        _set_value_axis(axes, lambda y: f"{y:,.0f}" if y >= 1 or not y else f"{y:g}")
        figure.subplots_adjust(left=0.17, right=0.985, top=0.96, bottom=0.23)
    rates = "; ".join(
        f"batch {each.batch_size}: teacher {each.teacher.images_per_second:,.0f}, "
        f"student {each.student.images_per_second:,.0f}"
        for each in measurements
    )
    description = f"{noun.capitalize()}s a second. {rates}."
    return svg(figure, name, f"Throughput of {runner_of(measurements[0])}", description)


def fidelity(found: Fidelity) -> Markup:
    """The error of each part alone as bars, and along the student's own chain as a line, in percent."""
    names = [each.name if len(each.name) <= _TICK else f"…{each.name[1 - _TICK :]}" for each in found.deviations]
    alone, chain = (
        [float("nan") if value is None else 100 * value for value in values]
        for values in zip(*((each.on_teacher, each.on_own) for each in found.deviations), strict=True)
    )
    slanted = max(map(len, names)) * _LETTER > _PLOT / len(names)
    # Slanted names extend below the axis, and to the left of their bar.
    reach = max(map(len, names)) * _LETTER * math.sqrt(0.5) if slanted else 0
    with panel(_LINES + 30 + reach) as (figure, axes):
        axes.bar(range(len(names)), alone, 0.5, color=FIRST)
        axes.plot(range(len(names)), chain, color=SECOND, **_CURVE)
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xticks(range(len(names)), names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
        _set_value_axis(axes, lambda y: f"{y:g} %")
        bottom = (34 + reach) / (_LINES + 30 + reach)
        figure.subplots_adjust(left=max(0.15, 0.72 * reach / _PLOT), right=0.985, top=0.96, bottom=bottom)
    errors = "; ".join(
        f"{each.name}: {relative_error(each.on_teacher)} on the teacher's input, "
        f"{relative_error(each.on_own)} in its own chain"
        for each in found.deviations
    )
    return svg(figure, "fidelity", "Error of the student's parts", f"Relative RMS errors. {errors}.")


def score_latency(measurements: Sequence[Measurement], measure: str, teacher: Value, student: Value) -> Markup:
    """A score in percent, with its 95 % interval, against latency on a log scale: one line per runner.

    Args:
        measurements: one per runner, at the same batch size.
        measure: what the score is called: `accuracy`.
        teacher, student: their scores on the same samples, 0–100.
    """
    ordered = sorted(measurements, key=lambda each: each.student.median_ms)
    legend_rows = -(-len(ordered) // _LEGEND_COLUMNS)
    height = _LINES + 30 + 24 * legend_rows
    with panel(height) as (figure, axes):
        for each, marker in zip(ordered, cycle(_MARKERS)):
            xs = (each.teacher.median_ms, each.student.median_ms)
            axes.plot(xs, (teacher.value, student.value), color=MUTED, lw=1, zorder=1)
            for x, score, color in zip(xs, (teacher, student), (FIRST, SECOND), strict=True):
                if score.low is not None and score.high is not None:
                    axes.plot((x, x), (score.low, score.high), color=color, lw=1.4, zorder=2)
                axes.plot(x, score.value, color=color, marker=marker, ms=8, zorder=3)
            axes.plot([], [], color=MUTED, marker=marker, ms=8, ls="", label=runner_of(each))
        _set_log_axis(axes, [side.median_ms for each in ordered for side in (each.teacher, each.student)])
        axes.set_xlabel("ms a call")
        _set_value_axis(axes, lambda y: f"{y:g} %")
        bottom = (62 + 24 * legend_rows) / height
        figure.subplots_adjust(left=0.17, right=0.985, top=0.96, bottom=bottom)
        figure.legend(loc="lower center", ncols=_LEGEND_COLUMNS, frameon=False, labelcolor=MUTED, handletextpad=0.2)
    medians = "; ".join(
        f"{runner_of(each)}: teacher {milliseconds(each.teacher.median_ms)} ms, "
        f"student {milliseconds(each.student.median_ms)} ms"
        for each in ordered
    )
    measure = measure.capitalize()
    description = f"{measure} of the teacher {teacher.text}, of the student {student.text}. {medians}."
    return svg(figure, "accuracy-latency", f"{measure} against latency", description)


def depth_latency(
    name: str, runner: str, batch_size: int, points: Sequence[tuple[int, Measurement]], teacher_depth: int
) -> Markup:
    """Latency against depth in one runner, with 95 % intervals, and the teacher as a dashed line.

    Args:
        name: of the drawing, unique on its page.
        points: (student's depth, its measurement with the teacher).
    """
    # The teacher was measured with each student; the shallowest student's measurement is as good as any other.
    teacher = median(points[0][1].teacher)
    students = [(depth, median(each.student)) for depth, each in points]
    with panel(_LINES) as (figure, axes):
        axes.axhline(teacher.value, color=FIRST, **_REFERENCE)
        axes.plot(*zip(*((depth, bar.value) for depth, bar in students), strict=True), color=SECOND, **_CURVE)
        axes.plot(teacher_depth, teacher.value, color=FIRST, marker="o")
        for depth, bar in [*students, (teacher_depth, teacher)]:
            if bar.low is not None and bar.high is not None:
                _draw_interval(axes, depth, bar.low, bar.high)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.set_xlabel("depth")
        _set_value_axis(axes)
        figure.subplots_adjust(left=0.15, right=0.97, top=0.96, bottom=0.23)
    medians = "; ".join(f"depth {depth}: {bar.text}" for depth, bar in students)
    title = f"Latency against depth in {runner} at batch size {batch_size}"
    return svg(figure, name, title, f"Teacher, depth {teacher_depth}: {teacher.text}. {medians}.")


def training_loss(rows: Sequence[dict[str, Any]]) -> Markup | None:
    """The training loss over the epochs; None if the rows have none."""
    lines = _lines(rows, "loss")
    if not lines:
        return None
    with _epochs_panel() as (figure, axes):
        _draw_lines(axes, lines)
        if min(min(values) for _, values in lines) >= 0:  # an adversarial loss may be negative
            axes.set_ylim(bottom=0)
    first, last = lines[0][1][0], lines[-1][1][-1]
    return svg(figure, "training-loss", "Training loss over the epochs", f"From {first:.3g} to {last:.3g}.")


def validation_curve(rows: Sequence[dict[str, Any]], curve: Curve, teacher: float | None) -> Markup | None:
    """The task's metric on the validation split over the epochs, in its unit; None if the rows have none.

    Args:
        teacher: its score, shown as a dashed line; None: no line.
    """
    lines = [
        (epochs, [curve.factor * value for value in values])
        for epochs, values in _lines(rows, f"validation_{curve.metric}")
    ]
    if not lines:
        return None
    with _epochs_panel() as (figure, axes):
        if teacher is not None:
            axes.axhline(curve.factor * teacher, color=FIRST, **_REFERENCE)
        _draw_lines(axes, lines)
    description = f"From {lines[0][1][0]:.1f} to {lines[-1][1][-1]:.1f} {curve.unit}."
    if teacher is not None:
        description += f" The teacher has {curve.factor * teacher:.1f} {curve.unit}."
    return svg(figure, "validation-score", f"{curve.name} over the epochs", description)


def _lines(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[list[float], list[float]]]:
    """One line (epochs, values) per phase: each phase has a loss of its own, so no line joins them."""
    lines = []
    for _, members in groupby(rows, lambda row: row.get("phase", "")):
        known = [
            (row["epoch"], row[key]) for row in members if _is_number(row.get("epoch")) and _is_number(row.get(key))
        ]
        if known:
            lines.append(([float(x) for x, _ in known], [float(y) for _, y in known]))
    return lines


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@contextmanager
def _epochs_panel() -> Iterator[tuple[Figure, Axes]]:
    """A panel with the epochs on its x axis."""
    with panel(height=220) as (figure, axes):
        yield figure, axes
        _set_value_axis(axes, steps=None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set_xlabel("epoch")
        figure.subplots_adjust(left=0.13, right=0.985, top=0.95, bottom=0.23)


def _draw_lines(axes: Axes, lines: Sequence[tuple[list[float], list[float]]]) -> None:
    for index, (epochs, values) in enumerate(lines):
        axes.plot(epochs, values, color=SECOND, **_CURVE, ms=4 if len(epochs) < 40 else 0)
        if index:
            axes.axvline(epochs[0] - 0.5, color=MUTED, lw=1.0, ls=(0, (1, 2)))


def _draw_interval(axes: Axes, x: float, low: float, high: float) -> None:
    axes.plot((x, x), (low, high), color=TEXT, lw=1.4)


def _set_value_axis(
    axes: Axes, text: Callable[[float], str] | None = None, steps: tuple[int, ...] | None = (1, 2, 5, 10)
) -> None:
    """At most five round ticks on the y axis, with a grid behind the drawing. `text`: a tick's label."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=steps))
    if text is not None:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: text(y)))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _set_log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with some labels on it, even if all values are within one decade."""
    axes.set_xscale("log")
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.08, 1.05)
    axes.set_xlim(low / margin, high * margin)
    ratio = high / low
    subs = (1,) if ratio > 500 else (1, 2, 5) if ratio > 4 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
